"""A text in four parts: to tune on, to stop by, to validate and to report on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from confsteer.errors import CorpusError
from confsteer.evaluation.comparison import Sample
from confsteer.last_layer.unigram import Unigram
from confsteer.profile.profile import Profile
from confsteer.text.windows import Windows

SPLITS = (0.5, 0.15, 0.15, 0.2)
"""Shares of a text to tune on, to stop by, to validate and to report on.

Validation needs a part of its own: the part that chose when to stop would show a gain where there is none."""
MIN_BLOCKS = 20
"""Fewest documents or windows that can be split in this way."""


class Split(NamedTuple):
    """A text in four parts."""

    train: Sample
    stop: Sample
    """Part that decides when to stop."""
    validation: Sample
    """Part that decides whether anything was gained."""
    test: Sample
    unigram: Unigram
    """Unigram distribution of the whole text."""


def split(sample: Sample, windows: Windows, profile: Profile, seed: int) -> Split:
    """Cut a text into four parts that share no document. A text of few documents is cut into four stretches.

    Raises:
        CorpusError: it is too short.
    """
    train, stop, validation, test = share_out(sample, SPLITS, windows.window, seed)
    return Split(train, stop, validation, test, Unigram.from_counts(windows.counts(profile.model.tokenizer_size)))


def share_out(sample: Sample, shares: Sequence[float], window: int, seed: int) -> list[Sample]:
    """Cut a text into parts that share no document. A text of few documents is cut into stretches.

    Args:
        sample: the text.
        shares: sizes of the parts, which add up to 1.
        window: tokens per window, for the message.
        seed: seed of the order in which documents are assigned.

    Raises:
        CorpusError: it is too short.
    """
    ids = sample.block.unique()
    if len(ids) < MIN_BLOCKS:
        raise CorpusError(
            f"{sample.source}: {len(ids)} {sample.unit} are too few to tune on, to stop by, to validate and "
            f"to report on; give text of at least {MIN_BLOCKS} windows of {window} tokens"
        )
    if sample.unit == "documents":
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    numbers = torch.bincount(sample.block, minlength=int(ids.max()) + 1)[ids]
    # Assign each block by the share of the text before its middle.
    middle = (numbers.cumsum(dim=0) - numbers / 2) / numbers.sum()
    part = torch.bucketize(middle, torch.tensor(shares[:-1]).cumsum(dim=0))
    part[-1] = len(shares) - 1  # however long the last document is
    of_block = torch.zeros(int(ids.max()) + 1, dtype=torch.long)
    of_block[ids] = part
    parts = []
    for which in range(len(shares)):
        rows = (of_block[sample.block] == which).nonzero()[:, 0]
        if len(sample.block[rows].unique()) < 2:
            raise CorpusError(f"{sample.source}: its documents are too unequal to be shared out; give more of them")
        parts.append(sample._replace(reading=sample.reading.at(rows), block=sample.block[rows]))
    return parts
