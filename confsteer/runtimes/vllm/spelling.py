"""The text of an engine's tokens, for markers that are texts."""

from __future__ import annotations

import copy
from typing import Any

from confsteer.text.spelling import Spelling


def spelling_of(config: Any) -> Spelling | None:
    """Make the spelling of the tokens of an engine's model, by its ``VllmConfig``. None if it has no tokenizer."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(config.model_config)
    # Copy the tokenizer: other threads encode with vLLM's own, which cannot be used at the same time.
    return None if tokenizer is None else Spelling(copy.deepcopy(tokenizer))
