"""The bounds that make an entropy neuron or a token-frequency neuron.

Thresholds are percentiles within the layer, comparisons with chance, shares of an effect and multiples of a standard
error: never absolute sizes, which differ by orders of magnitude between models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.streaming import NeuronEffects, WithError
from confsteer.discovery.weights import WeightStatistics

HIGH_PERCENTILE = 75.0
"""A selected neuron's own effect is at or above this percentile of the layer."""
LOW_PERCENTILE = 25.0
"""An entropy neuron's logit variance is at or below this percentile of the layer."""
MIN_NORM_SHARE = 2 / 3
"""More than this share of what an entropy neuron's write does to the entropy goes through the final norm, which is twice what
goes straight to the logits."""
MIN_UNIGRAM_SHARE = 0.3
"""More than this share of a frequency neuron's effect on the loss goes through the unigram direction."""
STANDARD_ERRORS = 2.0
"""A selected neuron's share exceeds its bound, and a sign is clear, by this many standard errors."""
CONTENDER_ERRORS = 3.0
"""A neuron that a sample leaves short of a bound by more standard errors than this is not looked at again."""
MAX_SELECTED = 32
"""No more neurons of a kind than this are reported, the largest effects first."""


class Chosen(NamedTuple):
    """The neurons on a dial, the largest effects first."""

    neurons: list[int]
    sign: Tensor
    """Sign of the derivative of the dial's quantity with respect to each activation, ``[n_neurons]``; 0 where it is not clear.

    A neuron without one is what it is, but no dial can turn it.
    """


class Selection(NamedTuple):
    """The neurons on each dial."""

    entropy: Chosen
    unigram: Chosen


def percentile(values: Tensor) -> Tensor:
    """Each value's percentile within `values` ``[n]``: the share at or below it, in percent."""
    ordered = values.sort().values
    return 100.0 * torch.searchsorted(ordered, values.contiguous(), right=True).double() / len(values)


def _above(estimate: WithError, bound: float, errors: float) -> Tensor:
    """Whether an estimate exceeds a bound after so many standard errors are added."""
    # Of a single window there are no errors: nothing is clear, and nothing is ruled out.
    return estimate.value + errors * estimate.standard_error > bound


def _at_high_percentile(effect: WithError, errors: float) -> Tensor:
    """Whether an effect is at or above `HIGH_PERCENTILE` of the layer's after so many standard errors are added."""
    ranked = percentile(effect.value) >= HIGH_PERCENTILE
    lowest = effect.value[ranked].min()
    return effect.value + (errors * effect.standard_error if errors else 0) >= lowest


def _sign(slope: WithError) -> Tensor:
    return torch.where(slope.value.abs() > STANDARD_ERRORS * slope.standard_error, slope.value.sign(), 0)


def _largest_first(eligible: Tensor, effect: Tensor) -> list[int]:
    indices = eligible.nonzero()[:, 0]
    order = effect[indices].argsort(descending=True, stable=True)
    return [int(i) for i in indices[order][:MAX_SELECTED]]


def _unread_writes(weights: WeightStatistics) -> dict[str, Tensor]:
    """Whether each write has a low logit variance, and a null fraction that beats the luckiest of as many random ones."""
    return {
        f"logit var %ile ≤ {LOW_PERCENTILE:.0f}": (percentile(weights.logit_variance) <= LOW_PERCENTILE),
        f"null fraction > {weights.chance_null_fraction:.3f}": (weights.null_fraction > weights.chance_null_fraction),
    }


def _all(criteria: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(criteria.values())).all(dim=0)


def candidates(weights: WeightStatistics) -> list[int]:
    """Neurons that are entropy neurons as far as their weights can tell, the longest ``‖V₀ᵀw_i‖`` first.

    ``‖V₀ᵀw_i‖ = null_fraction · norm`` is how far one unit of activation moves the residual where the unembedding hardly
    reads it: a long write changes the norm much, its null part changes nothing else. How active the neuron is, and so how
    large its effect, the weights do not tell.
    """
    return _largest_first(_all(_unread_writes(weights)), weights.null_fraction * weights.norm)


def contenders(weights: WeightStatistics, sample: NeuronEffects, cosine: Tensor, chance_cosine: float) -> list[int]:
    """Neurons that could be selected by their effects on more text than the sample, ascending.

    Args:
        weights: statistics of the layer's weights.
        sample: effects of the layer, measured on a sample of the text.
        cosine: see `frequency_neurons`.
        chance_cosine: see `frequency_neurons`.
    """
    entropy = _all(_entropy_criteria(weights, sample, CONTENDER_ERRORS))
    frequency = _all(_frequency_criteria(sample, cosine, chance_cosine, CONTENDER_ERRORS))
    return (entropy | frequency).nonzero()[:, 0].tolist()


def _entropy_criteria(weights: WeightStatistics, effects: NeuronEffects, errors: float) -> dict[str, Tensor]:
    """Whether each neuron has what makes an entropy neuron, after so many standard errors are added to its effects."""
    return _unread_writes(weights) | {
        f"effect %ile ≥ {HIGH_PERCENTILE:.0f}": (_at_high_percentile(effects.entropy_abs, max(errors, 0))),
        f"share > {MIN_NORM_SHARE:.2f}": _above(effects.norm_share, MIN_NORM_SHARE, errors),
    }


def _frequency_criteria(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, errors: float) -> dict[str, Tensor]:
    """The same for a token-frequency neuron."""
    return {
        f"|cosine| > {chance_cosine:.3f}": cosine.abs() > chance_cosine,
        f"effect %ile ≥ {HIGH_PERCENTILE:.0f}": (_at_high_percentile(effects.frequency, max(errors, 0))),
        f"share > {MIN_UNIGRAM_SHARE:.2f}": (_above(effects.frequency_mediation, MIN_UNIGRAM_SHARE, errors)),
    }


class NearMiss(NamedTuple):
    """A neuron that lacks one thing only."""

    neuron: int
    lacks: str


def near_misses(
    weights: WeightStatistics, effects: NeuronEffects, cosine: Tensor, chance_cosine: float
) -> tuple[list[NearMiss], list[NearMiss]]:
    """Neurons that lack one criterion of an entropy neuron, and of a token-frequency neuron, the largest effects first."""
    entropy = _entropy_criteria(weights, effects, -STANDARD_ERRORS)
    frequency = _frequency_criteria(effects, cosine, chance_cosine, -STANDARD_ERRORS)
    found = []
    for criteria, effect in ((entropy, effects.entropy_abs.value), (frequency, effects.frequency.value)):
        fulfilled = torch.stack(list(criteria.values()))
        near = _largest_first((~fulfilled).sum(dim=0) == 1, effect)
        lacks = dict(zip(near, (~fulfilled).int().argmax(dim=0)[near].tolist(), strict=True))
        found.append([NearMiss(neuron, list(criteria)[lacks[neuron]]) for neuron in near])
    return found[0], found[1]


def entropy_neurons(weights: WeightStatistics, effects: NeuronEffects) -> list[int]:
    """Neurons that regulate confidence through the final norm, the largest mean ``|Δentropy|`` first.

    All of: a write with a low logit variance and a null fraction that beats the luckiest of as many random directions; and a
    large effect on the entropy, most of which goes through the final norm. The paper reads a high norm of the write off a plot
    as a sign of a large effect; here the effect itself is measured, and a small write of a neuron that is very active counts as
    well. The paper's mediation, ``1 − direct/total`` of the loss, tells little where a neuron's direct part opposes the part
    through the norm (Gemma 3's 17.1026 has −.04); it is reported beside the share of the parts.
    """
    eligible = _all(_entropy_criteria(weights, effects, -STANDARD_ERRORS))
    return _largest_first(eligible, effects.entropy_abs.value)


def frequency_neurons(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, *, excluding: list[int]) -> list[int]:
    """Neurons that move the output along the unigram direction, the largest mean ``|ΔKL(P_freq ‖ P_model)|`` first.

    Args:
        effects: measured effects of the layer.
        cosine: of each neuron's logit write with the unigram direction, ``[n_neurons]``.
        chance_cosine: what the luckiest of as many random directions reaches.
        excluding: neurons that are entropy neurons already: a neuron sits on one dial only.
    """
    eligible = _all(_frequency_criteria(effects, cosine, chance_cosine, -STANDARD_ERRORS))
    eligible[excluding] = False
    return _largest_first(eligible, effects.frequency.value)


def select_neurons(
    weights: WeightStatistics, effects: NeuronEffects, cosine: Tensor, chance_cosine: float, *, among: list[int]
) -> Selection:
    """Choose the neurons of both dials; a neuron that could sit on either is an entropy neuron.

    Args:
        weights: statistics of the layer's weights.
        effects: measured effects of the layer.
        cosine: see `frequency_neurons`.
        chance_cosine: see `frequency_neurons`.
        among: the `contenders`: the others rest on a sample, and are ruled out already.
    """
    entropy = [i for i in entropy_neurons(weights, effects) if i in among]
    unigram = frequency_neurons(effects, cosine, chance_cosine, excluding=entropy)
    return Selection(
        Chosen(entropy, _sign(effects.entropy_slope)), Chosen([i for i in unigram if i in among], _sign(effects.unigram_slope))
    )
