from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from confsteer.evaluation.metrics import (
    BINS,
    MASS_BINS,
    SELECTED,
    answer_metrics,
    calibration_metrics,
    equal_mass_bins,
    ranking_metrics,
    token_metrics,
    width_bins,
    width_calibration_error,
)
from confsteer.last_layer.scores import TokenScores
from confsteer.results.bootstrap import Blocks

items = st.lists(st.tuples(st.integers(0, 40).map(lambda i: i / 40), st.booleans()), min_size=2, max_size=60)


def random_scores(tokens: int = 400, vocab: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, TokenScores]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, vocab, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits, targets, TokenScores.of(logits, targets)


def columns(pairs: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([c for c, _ in pairs]), torch.tensor([y for _, y in pairs])


def one_block(n: int) -> Blocks:
    return Blocks(torch.zeros(n, dtype=torch.long))


def gaps_by_loop(pairs: list[tuple[float, bool]], bin_of: list[int]) -> list[tuple[int, float]]:
    """Number and |mean confidence − accuracy| of each bin."""
    found = []
    for b in set(bin_of):
        inside = [pair for pair, i in zip(pairs, bin_of, strict=True) if i == b]
        gap = sum(c for c, _ in inside) / len(inside) - sum(y for _, y in inside) / len(inside)
        found.append((len(inside), abs(gap)))
    return found


def test_scores_by_their_definition() -> None:
    logits, targets, scores = random_scores(tokens=20)
    for t, (z, y) in enumerate(zip(logits.double(), targets.tolist(), strict=True)):
        p = [math.exp(x) for x in z.tolist()]
        p = [x / sum(p) for x in p]
        assert scores.nll[t] == pytest.approx(-math.log(p[y]), rel=1e-5)
        assert scores.entropy[t] == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-5)
        assert scores.confidence[t] == pytest.approx(max(p), rel=1e-5)
        assert bool(scores.correct[t]) == (max(p) == p[y])


@given(st.lists(st.tuples(st.floats(1 / 512, 511 / 512, width=32), st.booleans()), min_size=1, max_size=50))
def test_torchmetrics_ours_and_a_loop_agree(pairs: list[tuple[float, bool]]) -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    # Away from bin edges, where float32 and float64 may disagree about the side.
    pairs = [(c, y) for c, y in pairs if abs(c * BINS - round(c * BINS)) > 1e-4] or [(0.5, True)]
    confidence, correct = columns(pairs)
    gaps = gaps_by_loop(pairs, [min(int(c * BINS), BINS - 1) for c, _ in pairs])
    expected = sum(n * gap for n, gap in gaps) / len(pairs)
    ece, mce = width_calibration_error(confidence, correct, one_block(len(pairs)))
    assert float(binary_calibration_error(confidence, correct.long(), n_bins=BINS)) == pytest.approx(expected, abs=1e-5)
    assert ece.value == pytest.approx(expected, abs=1e-5)
    assert mce.value == pytest.approx(max(gap for _, gap in gaps), abs=1e-5)


@given(items, st.randoms(use_true_random=False))
def test_equal_mass_bins_depend_on_values_not_on_order(pairs: list[tuple[float, bool]], shuffler: random.Random) -> None:
    shuffled = pairs[:]
    shuffler.shuffle(shuffled)
    found = []
    for order in (pairs, shuffled):
        confidence, correct = columns(order)
        bin_of, bins = equal_mass_bins(confidence, MASS_BINS)
        assert sorted(set(bin_of.tolist())) == list(range(bins))
        assert bins <= MASS_BINS
        by_value: dict[float, set[int]] = {}
        for (value, _), i in zip(order, bin_of.tolist(), strict=True):
            by_value.setdefault(value, set()).add(i)
        assert all(len(inside) == 1 for inside in by_value.values())
        gaps = gaps_by_loop(order, bin_of.tolist())
        ece = calibration_metrics(confidence, correct, one_block(len(order)))["ece_equal_mass"].value
        assert ece == pytest.approx(sum(n * gap for n, gap in gaps) / len(order), abs=1e-6)
        found.append(ece)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_equal_mass_bins_hold_equal_numbers_of_distinct_values() -> None:
    bin_of, bins = equal_mass_bins(torch.randperm(1000) / 1000, 10)
    assert bins == 10
    assert torch.bincount(bin_of).tolist() == [100] * 10


def test_a_thousand_equal_confidences_are_one_bin() -> None:
    """Bins cut by index would show 0.42 here if the right ones come first."""
    confidence, correct = torch.full((1000,), 0.9), torch.arange(1000) < 600
    assert calibration_metrics(confidence, correct, one_block(1000))["ece_equal_mass"].value == pytest.approx(0.3, abs=1e-6)


@given(items.filter(lambda pairs: len({y for _, y in pairs}) == 2))
def test_auroc_is_torchmetrics_and_the_pairs_definition(pairs: list[tuple[float, bool]]) -> None:
    from torchmetrics.functional.classification import binary_auroc

    confidence, correct = columns(pairs)
    ours = calibration_metrics(confidence, correct, one_block(len(pairs)))["auroc"].value
    right, wrong = ([c for c, y in pairs if y == side] for side in (True, False))
    by_pairs = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong) / (len(right) * len(wrong))
    assert ours == pytest.approx(by_pairs, abs=1e-9)
    assert ours == pytest.approx(float(binary_auroc(confidence, correct.long())), abs=1e-5)


@given(items)
def test_selective_metrics_by_numerical_integration(pairs: list[tuple[float, bool]]) -> None:
    """Equal confidences come in no order, so each of them counts as right as all of them are on average."""
    confidence, correct = columns(pairs)
    ours = calibration_metrics(confidence, correct, one_block(len(pairs)))
    ordered = sorted(pairs, reverse=True)
    rate = [sum(y for c, y in pairs if c == value) / sum(c == value for c, _ in pairs) for value, _ in ordered]
    steps = 4000
    total, area, selected = 0.0, 0.0, 0.0
    for i in range(steps):
        total += rate[int(i / steps * len(pairs))] / steps
        area += total / ((i + 1) / steps) / steps
        if i + 1 == int(SELECTED * steps):
            selected = total / SELECTED
    assert ours["coverage_area"].value == pytest.approx(area, abs=5e-3)
    assert ours["selective_accuracy"].value == pytest.approx(selected, abs=5e-3)


def test_ranking_is_undefined_where_all_are_right() -> None:
    found = calibration_metrics(torch.tensor([0.2, 0.9]), torch.tensor([True, True]), one_block(2))
    assert "auroc" not in found
    assert found["coverage_area"].value == 1
    assert ranking_metrics(torch.ones(1, 3).double(), torch.zeros(1, 3).double())["coverage_area"].item() == 0


def test_resamples_of_a_ranking_are_those_of_the_tokens_drawn() -> None:
    _, _, scores = random_scores()
    blocks = Blocks(torch.arange(400) // 10)
    found = calibration_metrics(scores.confidence, scores.correct, blocks)
    for draw in range(3):
        rows = torch.arange(400).repeat_interleave(blocks.weights[draw].long()[blocks.index])
        again = calibration_metrics(scores.confidence[rows], scores.correct[rows], one_block(len(rows)))
        for name in ("brier", "accuracy"):
            assert float(found[name].resampled[draw]) == pytest.approx(again[name].value, abs=1e-5)
        for name in ("auroc", "coverage_area", "selective_accuracy"):
            assert float(found[name].resampled[draw]) == pytest.approx(again[name].value, abs=5e-3)


def test_means_over_all_tokens() -> None:
    _, _, scores = random_scores()
    _, _, other = random_scores(seed=1)
    found = token_metrics(scores, Blocks(torch.arange(400) // 40), unsteered=other)
    assert found["loss"].value == pytest.approx(float(scores.nll.mean()))
    assert found["perplexity"].value == pytest.approx(math.exp(float(scores.nll.mean())))
    assert found["entropy"].value == pytest.approx(float(scores.entropy.mean()))
    assert found["brier"].value == pytest.approx(float((scores.confidence - scores.correct.float()).square().mean()))
    assert found["accuracy"].value == pytest.approx(float(scores.correct.float().mean()))
    assert found["argmax_changed"].value == pytest.approx(float((scores.prediction != other.prediction).float().mean()))
    for estimate in found.values():
        low, high = estimate.interval[1:]
        assert low <= high
    low, high = found["loss"].interval[1:]
    assert low < found["loss"].value < high


def test_smooth_ece_is_relplot_s() -> None:
    relplot = pytest.importorskip("relplot")
    _, _, scores = random_scores()
    found = calibration_metrics(scores.confidence, scores.correct, Blocks(torch.arange(400) // 40), smooth=True)["smooth_ece"]
    expected = relplot.smECE(scores.confidence.double().numpy(), scores.correct.double().numpy())
    assert found.value == pytest.approx(expected, abs=1e-9)
    assert found.interval.low < found.interval.high


def test_answers_by_their_definition() -> None:
    log_likelihood = torch.tensor([[-3.0, -1.0, -2.0], [-5.0, -5.0, -math.inf], [-1.0, -9.0, -4.0]])
    gold = torch.tensor([1, 0, 2])
    found = answer_metrics(log_likelihood, gold, one_block(3))
    shares = [[math.exp(x) for x in row] for row in log_likelihood.tolist()]
    shares = [[x / sum(row) for x in row] for row in shares]
    assert found["loss"].value == pytest.approx(-sum(math.log(row[g]) for row, g in zip(shares, gold.tolist(), strict=True)) / 3)
    assert found["accuracy"].value == pytest.approx(2 / 3)
    brier = sum(sum((p - (i == g)) ** 2 for i, p in enumerate(row)) for row, g in zip(shares, gold.tolist(), strict=True)) / 3
    assert found["brier_multiclass"].value == pytest.approx(brier)
    assert found["entropy"].value == pytest.approx(-sum(p * math.log(p) for row in shares for p in row if p) / 3)


def test_resamples_of_calibration_errors_say_how_large_the_gaps_would_have_to_be() -> None:
    """Gaps of that size, with the noise of the tokens drawn, have the error that was found; or the noise has it alone."""
    _, _, scores = random_scores()
    blocks = Blocks(torch.arange(400) // 10)
    bins = width_bins(scores.confidence)
    gap = scores.confidence.double() - scores.correct.double()

    def shares(rows: Tensor) -> Tensor:
        return torch.bincount(bins[rows], weights=gap[rows], minlength=BINS) / len(rows)

    ece = calibration_metrics(scores.confidence, scores.correct, blocks)["ece"]
    whole = shares(torch.arange(400))
    for draw in range(20):
        noise = shares(torch.arange(400).repeat_interleave(blocks.weights[draw].long()[blocks.index])) - whole
        size = float(ece.resampled[draw]) / ece.value
        if size == 0:
            assert float(noise.abs().sum()) >= ece.value
        else:
            assert float((size * whole + noise).abs().sum()) == pytest.approx(ece.value)


def test_the_interval_of_a_calibration_error_is_around_it() -> None:
    """Of a calibrated predictor, whose error is all chance, the plain percentile interval lies above."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(4000, generator=generator)
    correct = torch.rand(4000, generator=generator) < confidence
    ece = calibration_metrics(confidence, correct, Blocks(torch.arange(4000) // 40))["ece"]
    assert ece.interval.low < ece.value < ece.interval.high


def test_auroc_is_given_though_some_resamples_have_none() -> None:
    confidence = torch.linspace(0.1, 0.9, 60)
    correct = torch.arange(60) != 10
    auroc = calibration_metrics(confidence, correct, Blocks(torch.arange(60)))["auroc"]
    assert not auroc.resampled.isfinite().all()
    assert auroc.interval.low <= auroc.value <= auroc.interval.high
