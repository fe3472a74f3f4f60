"""Calibration, loss and entropy of next-token predictions, with bootstrap intervals over windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.readout import WORKING_SET, Readout

BINS = 15
RESAMPLES = 1000


class TokenScores(NamedTuple):
    """What a model said of each next token, ``[tokens]``."""

    nll: Tensor
    """Negative log-likelihood of the token that came, in nats."""
    entropy: Tensor
    """Of the predicted distribution, in nats."""
    confidence: Tensor
    """Probability of the most likely token."""
    prediction: Tensor
    """Id of the most likely token."""
    correct: Tensor
    """Whether the most likely token came."""

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> TokenScores:
        """From logits ``[tokens, vocab]`` and the ids that came ``[tokens]``."""
        log_p = logits.float().log_softmax(dim=-1)
        top, prediction = log_p.max(dim=-1)
        return cls(
            nll=-log_p.gather(1, targets[:, None])[:, 0],
            entropy=-(log_p.exp() * log_p).sum(dim=-1),
            confidence=top.exp().clamp_max(1.0),
            prediction=prediction,
            correct=prediction == targets,
        )

    @classmethod
    def of_residual(cls, readout: Readout, residual: Tensor, targets: Tensor) -> TokenScores:
        """From inputs of the final norm ``[tokens, d_model]``, edited ones too: no model runs, logits are held in chunks."""
        step = max(1, WORKING_SET // readout.vocab_size)
        chunks = [cls.of(readout.logits(rows), ids) for rows, ids in zip(residual.split(step), targets.split(step), strict=True)]
        return cls(*map(torch.cat, zip(*chunks, strict=True)))


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Change(NamedTuple):
    """What an intervention changes of a mean; both sides are of the same tokens, so the interval is of pairs."""

    nats: Interval
    relative: Interval
    """As a share of the mean without the intervention."""

    @classmethod
    def of(cls, difference: Tensor, before: Tensor, n: Tensor) -> Change:
        """From sums per window of the differences, of the values before, and numbers of tokens, float64 ``[windows]`` each."""
        return cls(ratio_interval(difference, n), ratio_interval(difference, before))


def ratio_interval(numerator: Tensor, denominator: Tensor) -> Interval:
    """``Σ numerator / Σ denominator`` over windows (float64 ``[windows]`` each); with numbers of tokens below it is a mean."""
    weights = bootstrap_weights(len(numerator))
    return _interval(float(numerator.sum() / denominator.sum()), (weights @ numerator) / (weights @ denominator))


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """ECE of the top prediction over `BINS` equal-width bins, by torchmetrics.

    Args:
        confidence: ``[n]``, probabilities.
        correct: ``[n]`` bool.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(confidence, correct.long(), n_bins=BINS, norm="l1"))


class ReliabilityBins(NamedTuple):
    """Sums per bin of confidence, ``[..., BINS]``."""

    tokens: Tensor
    confidence: Tensor
    correct: Tensor

    @classmethod
    def per_window(cls, scores: TokenScores, window: Tensor, n_windows: int) -> ReliabilityBins:
        """Sums per window and bin, ``[n_windows, BINS]`` float64; bins are ``[a, b)``, the last includes 1."""
        bins = (scores.confidence.double() * BINS).long().clamp_max(BINS - 1)
        index = window * BINS + bins

        def sums(values: Tensor) -> Tensor:
            return torch.bincount(index, weights=values.double(), minlength=n_windows * BINS).view(n_windows, BINS)

        return cls(sums(torch.ones_like(scores.confidence)), sums(scores.confidence), sums(scores.correct))


def window_sums(values: Tensor, window: Tensor, n_windows: int) -> Tensor:
    """Sum of `values` ``[tokens]`` in each window, float64 ``[n_windows]``."""
    return torch.bincount(window, weights=values.double(), minlength=n_windows)


def bootstrap_weights(n_windows: int, *, seed: int = 0) -> Tensor:
    """How often each window is drawn in each of `RESAMPLES` resamples, float64 ``[RESAMPLES, n_windows]``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, n_windows, (RESAMPLES, n_windows), generator=generator)
    return torch.zeros(RESAMPLES, n_windows, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )


class Metrics(NamedTuple):
    """Metrics over all tokens."""

    loss: Interval
    """Mean negative log-likelihood, in nats."""
    perplexity: Interval
    entropy: Interval
    """Mean entropy of the prediction, in nats."""
    ece: Interval
    """Expected calibration error of the top prediction, 15 equal-width bins."""
    brier: Interval
    """Mean squared difference of the top probability and its being right."""
    accuracy: Interval
    argmax_changed: Interval
    """Share of tokens whose most likely next token is not that of the unsteered model."""


def metrics(scores: TokenScores, window: Tensor, *, unsteered: TokenScores, seed: int = 0) -> Metrics:
    """All metrics with intervals; tokens of a window are resampled together.

    Args:
        scores: of the model to judge.
        window: which window each token is in, ``[tokens]``, 0 to n − 1.
        unsteered: scores of the same tokens without steering.
        seed: of the resampling; the same for two calls gives the same resamples.
    """
    n_windows = int(window.max()) + 1
    weights = bootstrap_weights(n_windows, seed=seed)
    n = window_sums(torch.ones_like(scores.nll), window, n_windows)
    resampled_n = weights @ n

    def mean(values: Tensor, transform: Callable[[Tensor], Tensor] = lambda x: x) -> Interval:
        sums = window_sums(values, window, n_windows)
        return _interval(float(transform(sums.sum() / n.sum())), transform((weights @ sums) / resampled_n))

    bins = ReliabilityBins.per_window(scores, window, n_windows)
    gaps = (weights @ bins.confidence - weights @ bins.correct).abs().sum(dim=1) / resampled_n
    return Metrics(
        loss=mean(scores.nll),
        perplexity=mean(scores.nll, torch.exp),
        entropy=mean(scores.entropy),
        ece=_interval(expected_calibration_error(scores.confidence, scores.correct), gaps),
        brier=mean((scores.confidence - scores.correct.float()).square()),
        accuracy=mean(scores.correct),
        argmax_changed=mean(scores.prediction != unsteered.prediction),
    )


def _interval(value: float, resampled: Tensor) -> Interval:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(value, low, high)
