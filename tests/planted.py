"""A planted model with its profile, made once per test session."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

import confsteer
from confsteer import Profile, Steering
from confsteer.text.windows import make_windows
from tests.models import VOCAB, planted_model, tiny_tokenizer, zipf_texts


class Planted(NamedTuple):
    model: Any
    tokenizer: PreTrainedTokenizerFast
    texts: list[str]
    profile: Profile

    def save(self, folder: Path) -> None:
        """As ``model`` and ``profile`` in a folder."""
        self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        self.profile.save(folder / "profile")


@functools.cache
def planted(model_type: str, *, wide: bool = False, tied: bool = False) -> Planted:
    """Tests must leave the model as they found it."""
    texts, tokenizer = zipf_texts(20, 200), tiny_tokenizer()
    counts = make_windows(texts, tokenizer, window=64).counts(VOCAB)
    model = planted_model(model_type, counts, wide=wide, tied=tied)
    return Planted(model, tokenizer, texts, confsteer.calibrate(model, tokenizer, texts, window=64, source="zipf"))


def output_weights(steering: Steering, *, seed: int = 0, documents: int = 60, found: Planted | None = None) -> list[str]:
    """Documents that a planted model, the Llama if None, writes when it is steered: this steering is the one to be found."""
    found = found or planted("llama")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (documents, 1), generator=generator)
    with torch.no_grad(), confsteer.steer(found.model, found.profile, steering):
        for _ in range(62):
            p = found.model(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return [" ".join(f"t{i}" if i else "<eos>" for i in row) for row in ids.tolist()]
