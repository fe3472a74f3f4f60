"""The bundled demonstration model: small, trained on public-domain books, with neurons that regulate its confidence."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from confsteer.model.loading import DEMO_NAME, DEMO_UNIGRAM, load_model
from confsteer.profile.profile import Profile
from confsteer.text.counts import read_counts
from confsteer.text.sources import python_docs


class Demo(NamedTuple):
    """The demonstration model, its tokenizer and its profile."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    profile: Profile


def load() -> Demo:
    """Load the demonstration model on the CPU, its tokenizer and its shipped profile."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # nobody waits for so few weights
    try:
        model, tokenizer = load_model(None, device="cpu")
    finally:
        if shown:
            logging.enable_progress_bar()
    assert isinstance(model, GPT2LMHeadModel)
    return Demo(model, tokenizer, Profile.load(DEMO_NAME))


def texts(part: Literal["calibration", "held-out"] = "calibration") -> list[str]:
    """Read half of the Python documentation, one document per topic: text that is on every machine."""
    return python_docs(part)


def unigram_counts() -> NDArray[np.integer]:
    """Read the token counts of the text that the model was trained on, by id."""
    return read_counts(DEMO_UNIGRAM)
