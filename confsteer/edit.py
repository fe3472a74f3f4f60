"""What a steering does to each neuron of a profile: the rule that every runtime shares.

One rule covers everything: an activation ``a`` becomes ``clip(gain · a + bias, low, high)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confsteer.errors import SteeringError
from confsteer.steering import DIALS, NeuronKey, Steering

if TYPE_CHECKING:
    from confsteer.profile import Neuron, Profile


class NeuronEdit(NamedTuple):
    """``a' = clip(gain · a + bias, low, high)`` for each of a profile's neurons, float32 ``[neurons]``."""

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]


NEUTRAL_RULE = (1.0, 0.0, -np.inf, np.inf)
"""The gain, bias, low and high that change nothing."""


def steerable(profile: Profile) -> tuple[Neuron, ...]:
    """The neurons that steering can reach, in the order of every `NeuronEdit`.

    Raises:
        NoNeuronsError: there are none.
    """
    neurons = (*profile.entropy_neurons, *profile.frequency_neurons)
    if not neurons:
        raise profile.no_neurons("entropy", "token-frequency")
    return neurons


def resolve(steering: Steering, profile: Profile) -> Steering:
    """`steering` with its preset written out: the preset's fields, and in place of them those that it gives itself.

    Raises:
        SteeringError: the profile has no such preset.
    """
    if steering.preset is None:
        return steering
    if steering.preset not in profile.presets:
        presets = ", ".join(profile.presets) or "(none)"
        raise SteeringError(f"preset {steering.preset!r}: not in the profile of {profile.model.id}, which has {presets}")
    given = {name: getattr(steering, name) for name in steering.model_fields_set if name != "preset"}
    preset = profile.presets[steering.preset]
    return preset.model_copy(update=given)


def neuron_edit(steering: Steering, profile: Profile) -> NeuronEdit:
    """What `steering` does to each of the profile's neurons.

    A neuron is first scaled about its mean, then shifted and pushed by the dials, then clamped.

    Raises:
        SteeringError: a dial is out of reach, or a neuron or preset is not in the profile.
        NoNeuronsError: the model has no neurons of the kind asked for.
    """
    steering = resolve(steering, profile)
    neurons = steerable(profile)
    rows = {neuron.index: row for row, neuron in enumerate(neurons)}
    groups = {
        "entropy": [rows[neuron.index] for neuron in profile.entropy_neurons],
        "frequency": [rows[neuron.index] for neuron in profile.frequency_neurons],
    }

    def rows_of(key: NeuronKey) -> list[int]:
        found = groups[key] if isinstance(key, str) else [rows[key]] if key in rows else []
        if not found:
            what = f"{key} neurons" if isinstance(key, str) else f"neuron {key}"
            raise SteeringError(f"{what}: not in the profile of {profile.model.id}, which has {', '.join(map(str, rows))}")
        return found

    mean = np.array([neuron.mean_activation for neuron in neurons])
    gain, bias = np.ones(len(neurons)), np.zeros(len(neurons))
    low, high = np.full(len(neurons), -np.inf), np.full(len(neurons), np.inf)
    for key, factor in steering.scale.items():
        gain[rows_of(key)] = factor
    bias += (1 - gain) * mean
    shift = np.zeros(len(neurons))
    for key, change in steering.shift.items():
        shift[rows_of(key)] = change
    bias += shift
    for dial in DIALS:
        change = getattr(steering, dial)
        if change:
            position = profile.dial_position(dial, change)
            for neuron in profile.neurons(dial):
                bias[rows[neuron.index]] += position * neuron.sign * neuron.std_activation
    for key, bounds in steering.clamp.items():
        lower, upper = bounds if isinstance(bounds, tuple) else (bounds, bounds)
        low[rows_of(key)] = -np.inf if lower is None else lower
        high[rows_of(key)] = np.inf if upper is None else upper
    with np.errstate(over="ignore"):
        edit = NeuronEdit(*(column.astype(np.float32) for column in (gain, bias, low, high)))
    if not (np.isfinite(edit.gain).all() and np.isfinite(edit.bias).all()):
        raise SteeringError(f"{steering}: with the profile of {profile.model.id} it adds more than a float32 holds")
    return edit


def edited(activations: Tensor, gain: Tensor, bias: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The rule on the activations of the profile's neurons, ``[..., neurons]``; computed in float32, returned as given.

    Args:
        activations: of the neurons, in the order of `steerable`.
        gain: as the next three a column of `NeuronEdit`, broadcastable against the activations.
        bias: see gain.
        low: see gain.
        high: see gain.
    """
    return torch.clamp(activations.float() * gain + bias, low, high).to(activations.dtype)
