from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from confsteer.evaluation.metrics import (
    BINS,
    Interval,
    ReliabilityBins,
    TokenScores,
    bootstrap_weights,
    expected_calibration_error,
    metrics,
)


def random_scores(tokens: int = 400, vocab: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, TokenScores]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, vocab, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits, targets, TokenScores.of(logits, targets)


def test_scores_by_their_definition() -> None:
    logits, targets, scores = random_scores(tokens=20)
    for t, (z, y) in enumerate(zip(logits.double(), targets.tolist(), strict=True)):
        p = [math.exp(x) for x in z.tolist()]
        p = [x / sum(p) for x in p]
        assert scores.nll[t] == pytest.approx(-math.log(p[y]), rel=1e-5)
        assert scores.entropy[t] == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-5)
        assert scores.confidence[t] == pytest.approx(max(p), rel=1e-5)
        assert bool(scores.correct[t]) == (max(p) == p[y])


def ece_by_loop(confidence: list[float], correct: list[bool]) -> float:
    gap = 0.0
    for i in range(BINS):
        inside = [j for j, c in enumerate(confidence) if min(int(c * BINS), BINS - 1) == i]
        if inside:
            accuracy = sum(correct[j] for j in inside) / len(inside)
            gap += len(inside) / len(confidence) * abs(accuracy - sum(confidence[j] for j in inside) / len(inside))
    return gap


@given(st.lists(st.tuples(st.floats(1 / 512, 511 / 512, width=32), st.booleans()), min_size=1, max_size=50))
def test_torchmetrics_the_bins_and_a_loop_agree(items: list[tuple[float, bool]]) -> None:
    # Away from bin edges, where float32 and float64 may disagree about the side.
    items = [(c, y) for c, y in items if abs(c * BINS - round(c * BINS)) > 1e-4] or [(0.5, True)]
    confidence, correct = torch.tensor([c for c, _ in items]), torch.tensor([y for _, y in items])
    expected = ece_by_loop([float(c) for c in confidence], [y for _, y in items])
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-5)
    scores = TokenScores(confidence, confidence, confidence, torch.zeros(len(items), dtype=torch.long), correct)
    bins = ReliabilityBins.per_window(scores, torch.zeros(len(items), dtype=torch.long), 1)
    assert float((bins.confidence - bins.correct).abs().sum()) / len(items) == pytest.approx(expected, abs=1e-5)


def test_metrics_are_means_over_all_tokens() -> None:
    _, _, scores = random_scores()
    _, _, other = random_scores(seed=1)
    window = torch.arange(400) // 40
    result = metrics(scores, window, unsteered=other)
    assert result.loss.value == pytest.approx(float(scores.nll.mean()))
    assert result.perplexity.value == pytest.approx(math.exp(float(scores.nll.mean())))
    assert result.entropy.value == pytest.approx(float(scores.entropy.mean()))
    assert result.brier.value == pytest.approx(float((scores.confidence - scores.correct.float()).square().mean()))
    assert result.accuracy.value == pytest.approx(float(scores.correct.float().mean()))
    assert result.argmax_changed.value == pytest.approx(float((scores.prediction != other.prediction).float().mean()))
    assert metrics(scores, window, unsteered=scores).argmax_changed == Interval(0, 0, 0)
    for interval in result:
        assert interval.low <= interval.high
    assert result.loss.low < result.loss.value < result.loss.high


def test_a_resample_is_of_whole_windows() -> None:
    weights = bootstrap_weights(7)
    assert weights.sum(dim=1).eq(7).all()
    assert torch.equal(weights, weights.round())
    assert torch.equal(weights, bootstrap_weights(7))
    assert float(weights.mean()) == pytest.approx(1)


def test_intervals_have_the_width_of_the_window_means() -> None:
    """Windows of different means: the interval is about ±1.96 standard errors over windows, not over tokens."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(100, generator=generator)
    values = levels.repeat_interleave(50)
    scores = TokenScores(values, values.abs(), torch.full_like(values, 0.5), torch.zeros(5000, dtype=torch.long), values > 0)
    interval = metrics(scores, torch.arange(5000) // 50, unsteered=scores).loss
    error = float(levels.std()) / 10
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_unequal_windows_are_weighted_by_their_tokens() -> None:
    _, _, scores = random_scores(tokens=100)
    window = torch.tensor([0] * 90 + [1] * 10)
    assert metrics(scores, window, unsteered=scores).loss.value == pytest.approx(float(scores.nll.mean()))
