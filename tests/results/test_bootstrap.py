from __future__ import annotations

import pytest
import torch

from confsteer.results.bootstrap import RESAMPLES, Blocks, Resampled, bootstrap_weights, mean, ratio_interval, resampled_norm


def test_a_resample_is_of_whole_blocks() -> None:
    weights = bootstrap_weights(7)
    assert weights.sum(dim=1).eq(7).all()
    assert torch.equal(weights, weights.round())
    assert torch.equal(weights, bootstrap_weights(7))
    assert float(weights.mean()) == pytest.approx(1)


def test_a_resampled_mean_is_that_of_the_tokens_drawn() -> None:
    block = torch.tensor([3, 3, 3, 8, 8, 5])
    values = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 7.0])
    blocks = Blocks(block)
    estimate = blocks.mean(values)
    assert estimate.value == pytest.approx(float(values.mean()))
    by_id = {3: [1.0, 2.0, 6.0], 5: [7.0], 8: [10.0, 20.0]}
    for draw in range(20):
        drawn = [v for times, ids in zip(blocks.weights[draw].int().tolist(), (3, 5, 8), strict=True) for v in times * by_id[ids]]
        assert float(estimate.resampled[draw]) == pytest.approx(sum(drawn) / len(drawn))


def test_sums_by_group_are_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    block, group = torch.randint(0, 5, (2, 100), generator=generator)
    values = torch.randn(100, generator=generator)
    sums = Blocks(block).sums(values, group, 5)
    for b in range(5):
        for g in range(5):
            assert float(sums[b, g]) == pytest.approx(float(values[(block == b) & (group == g)].sum()), abs=1e-5)


def test_intervals_have_the_width_of_the_block_means() -> None:
    """Blocks of different means: the interval is about ±1.96 standard errors over blocks, not over tokens."""
    levels = torch.randn(100, generator=torch.Generator().manual_seed(0))
    interval = Blocks(torch.arange(5000) // 50).mean(levels.repeat_interleave(50)).interval
    error = float(levels.std()) / 10
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_a_difference_is_paired() -> None:
    """Two measurements that differ by a constant differ by it on every resample, however much the blocks differ."""
    blocks = Blocks(torch.arange(300) // 10)
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    low, high = (blocks.mean(values + 0.25) - blocks.mean(values)).interval[1:]
    assert (low, high) == pytest.approx((0.25, 0.25), abs=1e-6)


def test_a_ratio_of_sums() -> None:
    interval = ratio_interval(torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 2.0]).double())
    assert interval == pytest.approx((0.75, 0.5, 1.0))


def test_the_mean_of_estimates() -> None:
    one, other = (Resampled(value, torch.full((RESAMPLES,), value).double()) for value in (1.0, 4.0))
    assert mean([one, other]).interval == (2.5, 2.5, 2.5)


def test_an_interval_is_within_what_can_be_and_holds_the_number() -> None:
    draws = torch.linspace(-0.2, 0.3, RESAMPLES).double()
    assert Resampled(0.4, draws, (0.0, 1.0)).interval == pytest.approx((0.4, 0.0, 0.4))
    assert Resampled(0.1, draws).interval.low == pytest.approx(-0.1875, abs=1e-3)


@pytest.mark.parametrize(("error", "held"), [(0.0, (0.94, 0.995)), (0.03, (0.92, 0.99)), (0.3, (0.91, 0.98))])
def test_the_interval_of_a_norm_holds_the_true_one_about_as_often_as_it_says(error: float, held: tuple[float, float]) -> None:
    """Gaps of ten bins, each as large and as noisy, of which nothing, little or all can be told from the noise.

    At zero only one end can miss, so that 97.5 % is right. Four hundred draws have a standard error of 1.1 %.
    """
    generator = torch.Generator().manual_seed(0)
    true, noise = torch.full((10,), error / 10, dtype=torch.float64), 0.01
    hits = 0
    for _ in range(400):
        found = true + noise * torch.randn(10, generator=generator, dtype=torch.float64)
        resampled = found + noise * torch.randn(200, 10, generator=generator, dtype=torch.float64)
        _, low, high = resampled_norm(lambda u: u.abs().sum(dim=-1), found, resampled).interval
        assert 0 <= low <= high <= 1
        hits += low <= error <= high
    assert held[0] <= hits / 400 <= held[1]
