"""A planted model with its profile, made once per test session."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

import confsteer
from confsteer import Profile
from confsteer.corpus import make_windows
from tests.models import VOCAB, planted_model, tiny_tokenizer, zipf_texts


class Planted(NamedTuple):
    model: Any
    tokenizer: PreTrainedTokenizerFast
    texts: list[str]
    profile: Profile


@functools.cache
def planted(model_type: str, *, wide: bool = False, tied: bool = False) -> Planted:
    """Tests must leave the model as they found it."""
    texts, tokenizer = zipf_texts(20, 200), tiny_tokenizer()
    counts = make_windows(texts, tokenizer, window=64).counts(VOCAB)
    model = planted_model(model_type, counts, wide=wide, tied=tied)
    return Planted(model, tokenizer, texts, confsteer.calibrate(model, tokenizer, texts, window=64, source="zipf"))
