"""The bundled demonstration model: small, trained on public-domain books, with neurons that regulate its confidence."""

from __future__ import annotations

from typing import NamedTuple

from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from confsteer.model.loading import DEMO_NAME, load_model
from confsteer.profile.profile import Profile


class Demo(NamedTuple):
    """The demonstration model, its tokenizer and its profile."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    profile: Profile


def load() -> Demo:
    """The demonstration model on the CPU, its tokenizer and its shipped profile."""
    model, tokenizer = load_model(None, device="cpu")
    assert isinstance(model, GPT2LMHeadModel)
    return Demo(model, tokenizer, Profile.load(DEMO_NAME))
