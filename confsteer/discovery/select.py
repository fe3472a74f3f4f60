"""The bounds that make an entropy neuron or a token-frequency neuron.

Thresholds are percentiles within the layer, comparisons with chance, shares of an effect and multiples of a standard error. They
are never absolute sizes, which differ by orders of magnitude between models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.discovery.streaming import NeuronEffects, WithError
from confsteer.discovery.weights import WeightStatistics

HIGH_PERCENTILE = 75.0
"""Percentile of the layer that a selected neuron's own effect must reach."""
LOW_PERCENTILE = 25.0
"""Percentile of the layer that an entropy neuron's logit variance must not exceed."""
MIN_NORM_SHARE = 2 / 3
"""Share of an entropy neuron's effect on the entropy that goes through the final norm must exceed this. Two thirds is twice the
part that goes straight to the logits."""
MIN_UNIGRAM_SHARE = 0.3
"""Share of a frequency neuron's effect on the loss that goes through the unigram direction must exceed this."""
STANDARD_ERRORS = 2.0
"""Standard errors by which a selected neuron's share must exceed its bound, and a slope must differ from zero."""
CONTENDER_ERRORS = 3.0
"""Standard errors below a bound, on a sample, beyond which a neuron is not measured again."""
MAX_SELECTED = 32
"""Most neurons of a kind that are reported, the largest effects first."""


class Chosen(NamedTuple):
    """The neurons on a dial, the largest effects first."""

    neurons: list[int]
    sign: Tensor
    """Sign of the derivative of the dial's quantity with respect to each activation, ``[n_neurons]``; 0 where it is not clear.

    A neuron without a clear sign is still selected, but no dial can turn it.
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
    """Whether an estimate, with so many standard errors added, exceeds a bound."""
    # A single window has no errors: nothing is clear, and nothing is ruled out.
    return estimate.value + errors * estimate.standard_error > bound


def _at_high_percentile(effect: WithError, errors: float) -> Tensor:
    """Whether an effect, with so many standard errors added, is at or above `HIGH_PERCENTILE` of the layer's."""
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
    """Whether each write has a low logit variance, and a null fraction above the largest of as many random writes."""
    return {
        f"logit var %ile ≤ {LOW_PERCENTILE:.0f}": percentile(weights.logit_variance) <= LOW_PERCENTILE,
        f"null fraction > {weights.chance_null_fraction:.3f}": weights.null_fraction > weights.chance_null_fraction,
    }


def _all(criteria: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(criteria.values())).all(dim=0)


def candidates(weights: WeightStatistics) -> list[int]:
    """Find the neurons whose weights are those of an entropy neuron, the longest ``‖V₀ᵀw_i‖`` first.

    ``‖V₀ᵀw_i‖ = null_fraction · norm`` is how far one unit of activation moves the residual where the unembedding hardly reads
    it. A long write changes the norm much, and its null part changes nothing else. The weights do not say how active the neuron
    is, and so not how large its effect is.
    """
    return _largest_first(_all(_unread_writes(weights)), weights.null_fraction * weights.norm)


def contenders(weights: WeightStatistics, sample: NeuronEffects, cosine: Tensor, chance_cosine: float) -> list[int]:
    """Find the neurons that could be selected by their effects on more text than the sample, ascending.

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
    """Whether each neuron meets each criterion of an entropy neuron, with so many standard errors added to its effects."""
    return _unread_writes(weights) | {
        f"effect %ile ≥ {HIGH_PERCENTILE:.0f}": _at_high_percentile(effects.entropy_abs, max(errors, 0)),
        f"share > {MIN_NORM_SHARE:.2f}": _above(effects.norm_share, MIN_NORM_SHARE, errors),
    }


def _frequency_criteria(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, errors: float) -> dict[str, Tensor]:
    """The same for a token-frequency neuron."""
    return {
        f"|cosine| > {chance_cosine:.3f}": cosine.abs() > chance_cosine,
        f"effect %ile ≥ {HIGH_PERCENTILE:.0f}": _at_high_percentile(effects.frequency, max(errors, 0)),
        f"share > {MIN_UNIGRAM_SHARE:.2f}": _above(effects.frequency_mediation, MIN_UNIGRAM_SHARE, errors),
    }


class NearMiss(NamedTuple):
    """A neuron that fails one criterion only."""

    neuron: int
    lacks: str


def near_misses(
    weights: WeightStatistics, effects: NeuronEffects, cosine: Tensor, chance_cosine: float
) -> tuple[list[NearMiss], list[NearMiss]]:
    """Find neurons that fail one criterion of an entropy neuron, or of a token-frequency neuron, the largest effects first."""
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
    """Find the neurons that regulate confidence through the final norm, the largest mean ``|Δentropy|`` first.

    Its write has a low logit variance, and a null fraction above the largest of as many random directions. Its effect on the
    entropy is large, and most of it goes through the final norm. The paper takes a high norm of the write, read off a plot, as a
    sign of a large effect. Here the effect itself is measured, so a small write of a very active neuron counts as well. The
    paper's mediation is ``1 − direct/total`` of the loss. It tells little where a neuron's direct part opposes the part through
    the norm (Gemma 3's 17.1026 has −.04). It is reported beside the share of the parts.
    """
    eligible = _all(_entropy_criteria(weights, effects, -STANDARD_ERRORS))
    return _largest_first(eligible, effects.entropy_abs.value)


def frequency_neurons(effects: NeuronEffects, cosine: Tensor, chance_cosine: float, *, excluding: list[int]) -> list[int]:
    """Find the neurons that move the output along the unigram direction, the largest mean ``|ΔKL(P_freq ‖ P_model)|`` first.

    Args:
        effects: measured effects of the layer.
        cosine: cosine of each neuron's logit write with the unigram direction, ``[n_neurons]``.
        chance_cosine: the largest cosine of as many random directions.
        excluding: neurons that are entropy neurons already, because a neuron is on one dial only.
    """
    eligible = _all(_frequency_criteria(effects, cosine, chance_cosine, -STANDARD_ERRORS))
    eligible[excluding] = False
    return _largest_first(eligible, effects.frequency.value)


def select_neurons(
    weights: WeightStatistics, effects: NeuronEffects, cosine: Tensor, chance_cosine: float, *, among: list[int]
) -> Selection:
    """Choose the neurons of both dials. A neuron that could be on either is an entropy neuron.

    Args:
        weights: statistics of the layer's weights.
        effects: measured effects of the layer.
        cosine: see `frequency_neurons`.
        chance_cosine: see `frequency_neurons`.
        among: the `contenders`. The others were measured on a sample only, and are ruled out already.
    """
    entropy = [i for i in entropy_neurons(weights, effects) if i in among]
    unigram = frequency_neurons(effects, cosine, chance_cosine, excluding=entropy)
    return Selection(
        Chosen(entropy, _sign(effects.entropy_slope)), Chosen([i for i in unigram if i in among], _sign(effects.unigram_slope))
    )
