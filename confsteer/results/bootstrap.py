"""Estimates with bootstrap intervals over blocks of tokens: documents, windows, questions.

The tokens of a block are alike, so blocks are drawn, not tokens. All estimates over the same blocks use the same draws, so
the difference of two estimates is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
HALVINGS = 40
"""Bisection steps in the search for what a resample says."""


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
    within: tuple[float, float] = (-math.inf, math.inf)
    """Lowest and highest value that the number can have."""

    @property
    def interval(self) -> Interval:
        """The 95 % percentile interval of the resamples on which the number is defined, cut to its range.

        It always holds the number itself. Noise makes some estimates too large, such as a calibration error. Such a number
        may lie beyond what the resamples say of the truth.
        """
        resampled = self.resampled[self.resampled.isfinite()].clamp(*self.within)
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
        return Interval(self.value, min(low, self.value), max(high, self.value))

    def __sub__(self, other: Resampled) -> Resampled:
        """The paired difference of two estimates over the same blocks."""
        return Resampled(self.value - other.value, self.resampled - other.resampled)

    def __truediv__(self, other: Resampled) -> Resampled:
        return Resampled(self.value / other.value, self.resampled / other.resampled)

    def map(self, function: Callable[[Tensor], Tensor]) -> Resampled:
        """Apply an elementwise function to the number and its resamples."""
        return Resampled(float(function(torch.tensor(self.value, dtype=torch.float64))), function(self.resampled))


def resampled_norm(norm: Callable[[Tensor], Tensor], gaps: Tensor, resampled: Tensor) -> Resampled:
    """Estimate a norm of gaps, such as a calibration error, which noise makes larger.

    Resampling adds noise to what is noisy already, so the norms of resamples are too large by more than the norm is. So each
    draw answers another question. Keep the proportions of the gaps as estimated: how large would they have to be, for this
    draw's noise to give the norm that was found? The answer is the norm of ``s · gaps`` where
    ``‖s · gaps + noise‖ = ‖gaps‖``. It is zero where the noise alone is that large. The percentiles of the answers are the
    ends of a test's inversion: at sizes between them, the norm that was found is not extreme.

    Args:
        norm: a function from ``[…, bins]`` to ``[…]``; at most 1 where it matters.
        gaps: estimated, float64 ``[bins]``.
        resampled: the gaps of each resample, ``[resamples, bins]``.
    """
    noise, value = resampled - gaps, norm(gaps)
    alone = norm(noise)
    # The norm is convex in s, below the norm found at zero and above it at the other end: there is one crossing.
    low, high = torch.zeros_like(alone), 1 + alone / value.clamp_min(torch.finfo(value.dtype).tiny)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        beyond = norm(middle[:, None] * gaps + noise) >= value
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return Resampled(float(value), torch.where(alone >= value, 0.0, high * value), (0.0, 1.0))


def mean(estimates: Sequence[Resampled]) -> Resampled:
    """The mean of estimates over different texts, each with resamples of its own."""
    values = [estimate.value for estimate in estimates]
    within = min(estimate.within[0] for estimate in estimates), max(estimate.within[1] for estimate in estimates)
    resampled = torch.stack([estimate.resampled.clamp(*estimate.within) for estimate in estimates])
    return Resampled(sum(values) / len(values), resampled.mean(dim=0), within)


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
    """Change of a mean by an intervention. Both means are over the same tokens, so the interval is a paired one."""

    nats: Interval
    relative: Interval
    """The change as a share of the mean without the intervention."""

    @classmethod
    def of(cls, difference: Tensor, before: Tensor, n: Tensor) -> Change:
        """Make it from sums per window of differences, of values before and of tokens, float64 ``[windows]`` each."""
        return cls(ratio_interval(difference, n), ratio_interval(difference, before))


def ratio_interval(numerator: Tensor, denominator: Tensor) -> Interval:
    """Estimate ``Σ numerator / Σ denominator`` over blocks, float64 ``[blocks]`` each. Over numbers of tokens it is a mean."""
    weights = bootstrap_weights(len(numerator))
    return Resampled(float(numerator.sum() / denominator.sum()), (weights @ numerator) / (weights @ denominator)).interval


def bootstrap_weights(blocks: int, *, seed: int = 0) -> Tensor:
    """Count how often each block is drawn in each of `RESAMPLES` resamples, float64 ``[RESAMPLES, blocks]``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, blocks, (RESAMPLES, blocks), generator=generator)
    return torch.zeros(RESAMPLES, blocks, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
