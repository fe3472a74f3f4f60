from __future__ import annotations

import pytest
import torch
from torch import Tensor

from confsteer.discovery import select
from confsteer.discovery.streaming import NeuronEffects, WithError
from confsteer.discovery.weights import WeightStatistics

N = 100
GOOD = [3, 8, 50]
"""Neurons that fulfil every criterion, the largest effect last."""


def estimate(background: float, good: float, error: float = 0.001) -> WithError:
    value = torch.full((N,), background, dtype=torch.float64) * torch.linspace(0.9, 1.1, N)
    value[GOOD] = torch.tensor([1.0, 1.1, 1.2], dtype=torch.float64) * good
    return WithError(value, torch.full((N,), error, dtype=torch.float64))


def layer() -> tuple[WeightStatistics, NeuronEffects, Tensor]:
    weights = WeightStatistics(
        norm=torch.ones(N),
        logit_variance=estimate(1.0, 0.1).value,
        null_fraction=estimate(0.3, 0.8).value.clamp_max(1.0),
        singular_values=torch.ones(8),
        null_dims=2,
        chance_null_fraction=0.6,
    )
    effects = NeuronEffects(
        **{name: estimate(0.01, 0.1) for name in NeuronEffects._fields}
        | {
            "norm_share": estimate(0.05, 0.8),
            "frequency_mediation": estimate(0.05, 0.6),
            "entropy_slope": estimate(0.2, 0.2),
            "unigram_slope": estimate(0.2, -0.2),
        }
    )
    return weights, effects, estimate(0.1, 0.7).value


def test_all_criteria_together_select_the_largest_first() -> None:
    weights, effects, cosine = layer()
    assert select.entropy_neurons(weights, effects) == GOOD[::-1]
    assert select.frequency_neurons(effects, cosine, 0.5, excluding=[]) == GOOD[::-1]
    assert select.frequency_neurons(effects, -cosine, 0.5, excluding=[]) == GOOD[::-1], "the sign of the cosine does not matter"
    assert select.frequency_neurons(effects, cosine, 0.5, excluding=[8]) == [50, 3]


def spoiled(values: Tensor, value: float) -> Tensor:
    changed = values.clone()
    changed[8] = value
    return changed


@pytest.mark.parametrize(("name", "value"), [("logit_variance", 1.0), ("null_fraction", 0.59)])
def test_each_weight_criterion_is_needed(name: str, value: float) -> None:
    weights, effects, _ = layer()
    worse = WeightStatistics(**weights._asdict() | {name: spoiled(getattr(weights, name), value)})
    assert select.entropy_neurons(worse, effects) == [50, 3]


@pytest.mark.parametrize(("name", "value"), [("entropy_abs", 0.001), ("norm_share", 0.667)])
def test_each_effect_criterion_of_entropy_neurons_is_needed(name: str, value: float) -> None:
    """0.301 is above the bound, but not by two standard errors of 0.001."""
    weights, effects, _ = layer()
    old = getattr(effects, name)
    worse = effects._replace(**{name: old._replace(value=spoiled(old.value, value))})
    assert select.entropy_neurons(weights, worse) == [50, 3]


@pytest.mark.parametrize(("name", "value"), [("frequency", 0.001), ("frequency_mediation", 0.301)])
def test_each_effect_criterion_of_frequency_neurons_is_needed(name: str, value: float) -> None:
    _, effects, cosine = layer()
    old = getattr(effects, name)
    worse = effects._replace(**{name: old._replace(value=spoiled(old.value, value))})
    assert select.frequency_neurons(worse, cosine, 0.5, excluding=[]) == [50, 3]


def test_percentiles_are_shares_at_or_below() -> None:
    assert select.percentile(torch.tensor([3.0, 1.0, 2.0, 2.0])).tolist() == [100, 25, 75, 75]


def ranked(rank: int, others: float) -> Tensor:
    """1 to 100, neuron 8 with a rank from below, the other good ones at one end of all."""
    values = torch.zeros(N, dtype=torch.float64)
    values[8] = rank
    values[[3, 50]] = torch.tensor([others, others], dtype=torch.float64)
    rest = [i for i in range(N) if i not in GOOD]
    taken = {rank, *((1, 2) if others < 1 else (99, 100))}
    values[rest] = torch.tensor([float(r) for r in range(1, N + 1) if r not in taken], dtype=torch.float64)
    return values


@pytest.mark.parametrize(("rank", "found"), [(25, [50, 8, 3]), (26, [50, 3])])
def test_a_low_variance_is_in_the_lowest_quarter(rank: int, found: list[int]) -> None:
    weights, effects, _ = layer()
    assert select.entropy_neurons(weights._replace(logit_variance=ranked(rank, 0.0)), effects) == found


@pytest.mark.parametrize(("rank", "in_it"), [(75, True), (74, False)])
def test_a_large_effect_is_in_the_highest_quarter(rank: int, in_it: bool) -> None:
    weights, effects, cosine = layer()
    effect = WithError(ranked(rank, 1000.0), torch.zeros(N, dtype=torch.float64))
    changed = effects._replace(entropy_abs=effect, frequency=effect)
    assert (8 in select.entropy_neurons(weights, changed)) == in_it
    assert (8 in select.frequency_neurons(changed, cosine, 0.5, excluding=[])) == in_it


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("norm_share", 0.6688, 0.6685),
        ("frequency_mediation", 0.3021, 0.3019),
    ],
)
def test_shares_exceed_their_bounds_by_two_standard_errors(name: str, inside: float, outside: float) -> None:
    weights, effects, cosine = layer()
    for value, found in ((inside, [50, 8, 3]), (outside, [50, 3])):
        old = getattr(effects, name)
        changed = effects._replace(**{name: old._replace(value=spoiled(old.value, value))})
        if name == "norm_share":
            assert select.entropy_neurons(weights, changed) == found
        else:
            assert select.frequency_neurons(changed, cosine, 0.5, excluding=[]) == found


def test_a_cosine_that_chance_reaches_is_not_enough() -> None:
    _, effects, cosine = layer()
    assert select.frequency_neurons(effects, spoiled(cosine, 0.5), 0.5, excluding=[]) == [50, 3]


def test_no_more_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, effects, _ = layer()
    monkeypatch.setattr(select, "MAX_SELECTED", 2)
    assert select.entropy_neurons(weights, effects) == [50, 8]


def test_one_window_shows_nothing_for_sure() -> None:
    """Without a standard error nothing is clear."""
    weights, effects, _ = layer()
    unsure = effects._replace(norm_share=effects.norm_share._replace(standard_error=torch.full((N,), float("inf"))))
    assert select.entropy_neurons(weights, unsure) == []


def test_contenders_are_those_that_more_text_could_select() -> None:
    weights, effects, cosine = layer()
    no_cosine = torch.zeros_like(cosine)
    assert select.contenders(weights, effects, no_cosine, 0.5) == GOOD
    assert select.contenders(weights._replace(null_fraction=no_cosine), effects, cosine, 0.5) == GOOD
    for error, stays in ((0.02, True), (0.01, False)):
        short = effects.norm_share.value.clone()
        short[8] = 0.626
        unsure = effects._replace(norm_share=WithError(short, torch.full_like(short, error)))
        assert select.entropy_neurons(weights, unsure) == [50, 3]
        assert (8 in select.contenders(weights, unsure, no_cosine, 0.5)) == stays


def test_a_single_window_rules_out_no_effect() -> None:
    weights, effects, cosine = layer()
    errors = torch.full((N,), torch.inf, dtype=torch.float64)
    unknown = NeuronEffects(*(WithError(estimate.value, errors) for estimate in effects))
    unread = (weights.null_fraction > weights.chance_null_fraction).nonzero()[:, 0].tolist()
    assert select.contenders(weights, unknown, torch.zeros_like(cosine), 0.5) == unread


def test_selection_is_among_the_contenders() -> None:
    weights, effects, cosine = layer()
    assert select.select_neurons(weights, effects, cosine, 0.5, among=[3, 50]).entropy.neurons == [50, 3]


@pytest.mark.parametrize(("slope", "sign"), [(0.0021, 1), (-0.0021, -1), (0.0019, 0), (-0.0019, 0), (0.0, 0)])
def test_a_sign_is_clear_from_two_standard_errors_on_and_no_condition(slope: float, sign: int) -> None:
    weights, effects, cosine = layer()
    changed = effects._replace(
        entropy_slope=effects.entropy_slope._replace(value=spoiled(effects.entropy_slope.value, slope)),
        unigram_slope=effects.unigram_slope._replace(value=spoiled(effects.unigram_slope.value, slope)),
    )
    every = list(range(N))
    selection = select.select_neurons(weights, changed, cosine, 0.5, among=every)
    assert selection.entropy.neurons == GOOD[::-1]
    assert int(selection.entropy.sign[8]) == sign
    only_frequency = select.select_neurons(weights._replace(null_fraction=torch.zeros(N)), changed, cosine, 0.5, among=every)
    assert only_frequency.unigram.neurons == GOOD[::-1]
    assert int(only_frequency.unigram.sign[8]) == sign


def test_near_misses_say_what_is_lacking() -> None:
    weights, effects, cosine = layer()
    short = effects._replace(norm_share=effects.norm_share._replace(value=spoiled(effects.norm_share.value, 0.4)))
    entropy, frequency = select.near_misses(weights, short, cosine, 0.5)
    assert entropy == [(8, "share > 0.67")]
    assert frequency == []
    entropy, frequency = select.near_misses(weights, effects, spoiled(cosine, 0.4), 0.5)
    assert (entropy, frequency) == ([], [(8, "|cosine| > 0.500")])
    # Two things lacking are no near miss.
    assert select.near_misses(weights._replace(null_fraction=spoiled(weights.null_fraction, 0.1)), short, cosine, 0.5)[0] == []
