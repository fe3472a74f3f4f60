"""The text of an engine's tokens, for markers that are texts."""

from __future__ import annotations

import copy
from typing import Any

from confsteer.text.spelling import Spelling


def spelling_of(config: Any) -> Spelling | None:
    """Spell the tokens of the model that an engine's ``VllmConfig`` is of; None where it has no tokenizer."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(config.model_config)
    # Other threads encode with vLLM's own, which cannot be asked meanwhile.
    return None if tokenizer is None else Spelling(copy.deepcopy(tokenizer))
