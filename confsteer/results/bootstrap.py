"""Estimates with bootstrap intervals over blocks of tokens: documents, windows, questions.

Tokens of a block are alike, so blocks are drawn and not tokens. Every estimate over the same blocks is of the same draws,
which makes the difference of two estimates a paired one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """A number, and what it would have been on each resample."""

    value: float
    resampled: Tensor
    """float64 ``[resamples]``"""

    @property
    def interval(self) -> Interval:
        """The 95 % percentile interval, of the resamples on which the number is defined."""
        low, high = (
            self.resampled[self.resampled.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=self.resampled.dtype)).tolist()
        )
        return Interval(self.value, low, high)

    def __sub__(self, other: Resampled) -> Resampled:
        """The paired difference of two estimates over the same blocks."""
        return Resampled(self.value - other.value, self.resampled - other.resampled)

    def __truediv__(self, other: Resampled) -> Resampled:
        return Resampled(self.value / other.value, self.resampled / other.resampled)

    def map(self, function: Callable[[Tensor], Tensor]) -> Resampled:
        """An elementwise function of it."""
        return Resampled(float(function(torch.tensor(self.value, dtype=torch.float64))), function(self.resampled))


def mean(estimates: Sequence[Resampled]) -> Resampled:
    """The mean of estimates over different texts, each with resamples of its own."""
    values = [estimate.value for estimate in estimates]
    return Resampled(sum(values) / len(values), torch.stack([estimate.resampled for estimate in estimates]).mean(dim=0))


class Blocks:
    """The block of each token, and the resamples of blocks."""

    def __init__(self, block: Tensor, *, seed: int = 0) -> None:
        """
        Args:
            block: of each token, ``[tokens]``; any integers.
            seed: of the resampling.
        """
        _, self.index = block.unique(return_inverse=True)
        self.number = int(self.index.max()) + 1
        self.weights = bootstrap_weights(self.number, seed=seed)
        self.tokens = self.total(torch.ones(len(block)))

    def sums(self, values: Tensor, group: Tensor | None = None, groups: int = 1) -> Tensor:
        """Sum of `values` ``[tokens]`` in each block and group, float64 ``[blocks, groups]``.

        Args:
            values: numbers or truth values.
            group: of each token, 0 to `groups` − 1.
            groups: how many there are.
        """
        index = self.index if group is None else self.index * groups + group
        return torch.bincount(index, weights=values.double(), minlength=self.number * groups).view(self.number, groups)

    def total(self, values: Tensor) -> Resampled:
        """Sum of `values` ``[tokens]`` over all tokens."""
        sums = self.sums(values)[:, 0]
        return Resampled(float(sums.sum()), self.weights @ sums)

    def mean(self, values: Tensor) -> Resampled:
        """Mean of `values` ``[tokens]`` over all tokens."""
        return self.total(values) / self.tokens


class Change(NamedTuple):
    """Change of a mean by an intervention; both sides are of the same tokens, so the interval is of pairs."""

    nats: Interval
    relative: Interval
    """As a share of the mean without the intervention."""

    @classmethod
    def of(cls, difference: Tensor, before: Tensor, n: Tensor) -> Change:
        """From sums per window of the differences, of the values before, and numbers of tokens, float64 ``[windows]`` each."""
        return cls(ratio_interval(difference, n), ratio_interval(difference, before))


def ratio_interval(numerator: Tensor, denominator: Tensor) -> Interval:
    """``Σ numerator / Σ denominator`` over blocks (float64 ``[blocks]`` each); with numbers of tokens below it is a mean."""
    weights = bootstrap_weights(len(numerator))
    return Resampled(float(numerator.sum() / denominator.sum()), (weights @ numerator) / (weights @ denominator)).interval


def bootstrap_weights(blocks: int, *, seed: int = 0) -> Tensor:
    """How often each block is drawn in each of `RESAMPLES` resamples, float64 ``[RESAMPLES, blocks]``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, blocks, (RESAMPLES, blocks), generator=generator)
    return torch.zeros(RESAMPLES, blocks, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
