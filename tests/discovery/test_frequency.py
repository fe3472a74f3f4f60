from __future__ import annotations

import pytest
import torch

from confsteer.discovery.frequency import ranks_tokens
from confsteer.last_layer.unigram import Unigram

VOCAB = 4096


def draw(tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Counts of text whose tokens follow Zipf's law."""
    p = 1 / torch.arange(1, VOCAB + 1).double()
    generator = torch.Generator().manual_seed(seed)
    return torch.bincount(torch.multinomial(p, tokens, replacement=True, generator=generator), minlength=VOCAB)


@pytest.mark.parametrize(("tokens", "enough"), [(25_000, False), (50_000, False), (400_000, True), (1_000_000, True)])
def test_counts_rank_tokens_when_another_text_gives_the_same_direction(tokens: int, enough: bool) -> None:
    one, other = draw(tokens), draw(tokens, seed=1)
    assert ranks_tokens(one) is enough
    agreement = float(Unigram.from_counts(one).direction @ Unigram.from_counts(other).direction)
    assert (agreement > 0.85) is enough


def test_many_counts_of_few_tokens_rank_nothing() -> None:
    counts = torch.zeros(VOCAB, dtype=torch.long)
    counts[: VOCAB // 3] = 1_000_000
    assert not ranks_tokens(counts)
    assert not ranks_tokens(torch.zeros(VOCAB, dtype=torch.long))
