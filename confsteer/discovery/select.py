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
MIN_SHARE = 0.3
"""At least this share of a selected neuron's total effect goes through the norm (entropy) or the unigram direction."""
STANDARD_ERRORS = 2.0
"""A selected neuron's share and slope exceed these bounds by this many standard errors."""
CONTENDER_ERRORS = 3.0
"""A neuron that a sample leaves short of a bound by more standard errors than this is not looked at again."""
MAX_SELECTED = 32
"""No more neurons of a kind than this are reported, the largest effects first."""


class Chosen(NamedTuple):
    """The neurons on a dial, the largest effects first."""

    neurons: list[int]
    slope: Tensor
    """Derivative of the dial's quantity with respect to each activation, ``[n_neurons]``; its sign is the neuron's."""


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


def _is_signed(slope: WithError) -> Tensor:
    return slope.value.abs() > STANDARD_ERRORS * slope.standard_error


def _largest_first(eligible: Tensor, effect: Tensor) -> list[int]:
    indices = eligible.nonzero()[:, 0]
    order = effect[indices].argsort(descending=True, stable=True)
    return [int(i) for i in indices[order][:MAX_SELECTED]]


def _unread_writes(weights: WeightStatistics) -> Tensor:
    """Whether each write has a low logit variance, and a null fraction that beats the luckiest of as many random ones."""
    low_variance = percentile(weights.logit_variance) <= LOW_PERCENTILE
    return low_variance & (weights.null_fraction > weights.chance_null_fraction)


def candidates(weights: WeightStatistics) -> list[int]:
    """Neurons that are entropy neurons as far as their weights can tell, the longest ``‖V₀ᵀw_i‖`` first.

    ``‖V₀ᵀw_i‖ = null_fraction · norm`` is how far one unit of activation moves the residual where the unembedding hardly
    reads it: a long write changes the norm much, its null part changes nothing else. How active the neuron is, and so how
    large its effect, the weights do not tell.
    """
    return _largest_first(_unread_writes(weights), weights.null_fraction * weights.norm)


def contenders(weights: WeightStatistics, sample: NeuronEffects, cosine: Tensor, chance_cosine: float) -> list[int]:
    """Neurons that could be selected by their effects on more text than the sample, ascending.

    Args:
        weights: statistics of the layer's weights.
        sample: effects of the layer, measured on a sample of the text.
        cosine: see `frequency_neurons`.
        chance_cosine: see `frequency_neurons`.
    """
    entropy = _could_be_entropy(weights, sample, CONTENDER_ERRORS)
    frequency = _could_be_frequency(sample, cosine, chance_cosine, CONTENDER_ERRORS)
    return (entropy | frequency).nonzero()[:, 0].tolist()


def _could_be_entropy(weights: WeightStatistics, effects: NeuronEffects, errors: float) -> Tensor:
    large = _at_high_percentile(effects.entropy_abs, max(errors, 0))
    return _unread_writes(weights) & large & _above(effects.mediation, MIN_SHARE, errors)


def _could_be_frequency(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, errors: float) -> Tensor:
    large = _at_high_percentile(effects.frequency, max(errors, 0))
    return (cosine.abs() > chance_cosine) & large & _above(effects.frequency_mediation, MIN_SHARE, errors)


def entropy_neurons(weights: WeightStatistics, effects: NeuronEffects) -> list[int]:
    """Neurons that regulate confidence through the final norm, the largest mean ``|Δentropy|`` first.

    All of: a write with a low logit variance and a null fraction that beats the luckiest of as many random directions; a
    large effect on the entropy, with a clear sign; and an effect on the loss that goes through the final norm. The paper
    reads a high norm of the write off a plot as a sign of a large effect; here the effect itself is measured, and a small
    write of a neuron that is very active counts as well.
    """
    eligible = _could_be_entropy(weights, effects, -STANDARD_ERRORS) & _is_signed(effects.entropy_slope)
    return _largest_first(eligible, effects.entropy_abs.value)


def frequency_neurons(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, *, excluding: list[int]) -> list[int]:
    """Neurons that move the output along the unigram direction, the largest mean ``|ΔKL(P_freq ‖ P_model)|`` first.

    Args:
        effects: measured effects of the layer.
        cosine: of each neuron's logit write with the unigram direction, ``[n_neurons]``.
        chance_cosine: what the luckiest of as many random directions reaches.
        excluding: neurons that are entropy neurons already: a neuron sits on one dial only.
    """
    eligible = _could_be_frequency(effects, cosine, chance_cosine, -STANDARD_ERRORS) & _is_signed(effects.unigram_slope)
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
        Chosen(entropy, effects.entropy_slope.value), Chosen([i for i in unigram if i in among], effects.unigram_slope.value)
    )
