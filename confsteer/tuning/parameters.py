"""Parameters of tuning, as an intervention and as a steering. Zero is neutral."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from confsteer.errors import SettingError
from confsteer.last_layer.intervention import Intervention
from confsteer.profile.profile import Profile
from confsteer.steering import DIALS, Dial, Steering


class NeuronParameters:
    """A gain about the mean and a shift of each neuron, ``2 · neurons`` parameters.

    The unit of a shift is half of its dial's reach.
    """

    def __init__(self, profile: Profile) -> None:
        self.neurons = profile.steerable
        self.number = 2 * len(self.neurons)
        self._mean = torch.tensor([neuron.mean_activation for neuron in self.neurons])
        self._unit = torch.tensor(
            [neuron.std_activation * _half_reach(profile, dial) for dial in DIALS for neuron in profile.neurons(dial)]
        )

    def intervention(self, at: Tensor) -> Intervention:
        """Turn parameters ``[number, …]`` into an intervention. Zero is neutral, and further numbers are not read."""
        gain, shift = self._gain_and_shift(at)
        return Intervention.neutral(len(self.neurons))._replace(gain=gain, bias=(1 - gain) * self._mean + shift)

    def steering(self, at: Tensor) -> Steering:
        """Turn parameters into a steering, rounded as it is stored."""
        gain, shift = self._gain_and_shift(at)
        return Steering(
            scale={neuron.key: _short(value) for neuron, value in zip(self.neurons, gain, strict=True)},
            shift={neuron.key: _short(value) for neuron, value in zip(self.neurons, shift, strict=True)},
        )

    def _gain_and_shift(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + at[: len(self.neurons)], at[len(self.neurons) : self.number] * self._unit


def _reach(profile: Profile, dial: Dial) -> tuple[float, float]:
    """Find the lowest and the highest position of a dial."""
    low, high = (profile.dial_position(dial, change) for change in profile.reach(dial))
    return low, high


def _half_reach(profile: Profile, dial: Dial) -> float:
    low, high = _reach(profile, dial)
    return (high - low) / 2


class DialParameters:
    """Positions of the profile's dials, in units of half their reach, and kept within it."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.dials: list[Dial] = [dial for dial in DIALS if dial in profile.response]
        self.number = len(self.dials)
        neurons = profile.steerable
        # Find what position 1 of each dial adds to each activation, [dials, neurons].
        self._push = torch.tensor(
            [
                [neuron.sign * neuron.std_activation * (neuron in profile.pushed(dial)) for neuron in neurons]
                for dial in self.dials
            ]
        )
        # Find what it adds along the null direction, [dials].
        direction = profile.null_direction
        self._null_push: Tensor | None = None
        if direction is not None:
            self._null_push = torch.tensor([direction.push if profile.turns_direction(dial) else 0.0 for dial in self.dials])
        self._low, self._high = torch.tensor([_reach(profile, dial) for dial in self.dials]).T

    def _positions(self, at: Tensor) -> Tensor:
        unit = (self._high - self._low) / 2
        positions: Tensor = (at[: self.number] * unit).maximum(self._low).minimum(self._high)
        return positions

    def intervention(self, at: Tensor) -> Intervention:
        """See `NeuronParameters`."""
        positions = self._positions(at)
        intervention = Intervention.neutral(self._push.shape[1])._replace(bias=positions @ self._push)
        return intervention if self._null_push is None else intervention._replace(null_write=positions @ self._null_push)

    def steering(self, at: Tensor) -> Steering:
        """See `NeuronParameters`."""
        changes: dict[str, Any] = {}
        for dial, position in zip(self.dials, self._positions(at).tolist(), strict=True):
            low, high = self.profile.reach(dial)
            curve = self.profile.response[dial]
            change = _short(float(np.interp(position, curve.position, curve.change(dial))))
            # Clip after rounding, because rounding may exceed the reach.
            changes[dial] = min(max(change, low), high)
        return Steering.parse(changes)


def parameters_of(profile: Profile, parameters: Literal["neurons", "dials"]) -> NeuronParameters | DialParameters:
    """Choose the parameters to tune.

    Raises:
        SettingError: neurons are asked for, but the profile's entropy dial turns none.
    """
    if parameters == "dials":
        return DialParameters(profile)
    if profile.null_direction is not None:
        raise SettingError(
            f"the entropy dial of {profile.model.id} turns a null direction, made by hand: a constant, which has no gain to "
            'tune. Tune the dials: --dials (parameters="dials" in Python)'
        )
    return NeuronParameters(profile)


def _short(value: float | Tensor) -> float:
    """Round to six digits, which are more than a text can distinguish."""
    return float(f"{float(value):.6g}")
