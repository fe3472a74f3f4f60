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


def _clear(estimate: WithError, bound: float) -> Tensor:
    return estimate.value - STANDARD_ERRORS * estimate.standard_error > bound


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


def entropy_neurons(weights: WeightStatistics, effects: NeuronEffects) -> list[int]:
    """Neurons that regulate confidence through the final norm, the largest mean ``|Δentropy|`` first.

    All of: a write with a low logit variance and a null fraction that beats the luckiest of as many random directions; a
    large effect on the entropy, with a clear sign; and an effect on the loss that goes through the final norm. The paper
    reads a high norm of the write off a plot as a sign of a large effect; here the effect itself is measured, and a small
    write of a neuron that is very active counts as well.
    """
    eligible = (
        _unread_writes(weights)
        & (percentile(effects.entropy_abs.value) >= HIGH_PERCENTILE)
        & _clear(effects.mediation, MIN_SHARE)
        & _is_signed(effects.entropy_slope)
    )
    return _largest_first(eligible, effects.entropy_abs.value)


def frequency_neurons(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, *, excluding: list[int]) -> list[int]:
    """Neurons that move the output along the unigram direction, the largest mean ``|ΔKL(P_freq ‖ P_model)|`` first.

    Args:
        effects: measured effects of the layer.
        cosine: of each neuron's logit write with the unigram direction, ``[n_neurons]``.
        chance_cosine: what the luckiest of as many random directions reaches.
        excluding: neurons that are entropy neurons already: a neuron sits on one dial only.
    """
    eligible = (
        (cosine.abs() > chance_cosine)
        & (percentile(effects.frequency.value) >= HIGH_PERCENTILE)
        & _clear(effects.frequency_mediation, MIN_SHARE)
        & _is_signed(effects.unigram_slope)
    )
    eligible[excluding] = False
    return _largest_first(eligible, effects.frequency.value)


def select_neurons(weights: WeightStatistics, effects: NeuronEffects, cosine: Tensor, chance_cosine: float) -> Selection:
    """Choose the neurons of both dials; a neuron that could sit on either is an entropy neuron.

    Args:
        weights: statistics of the layer's weights.
        effects: measured effects of the layer.
        cosine: see `frequency_neurons`.
        chance_cosine: see `frequency_neurons`.
    """
    entropy = entropy_neurons(weights, effects)
    unigram = frequency_neurons(effects, cosine, chance_cosine, excluding=entropy)
    return Selection(Chosen(entropy, effects.entropy_slope.value), Chosen(unigram, effects.unigram_slope.value))
