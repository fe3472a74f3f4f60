"""The steerings that weights can hold: ``a' = gain · a + bias`` before a linear layer makes another linear layer.

A neuron's output weights times its gain, and its original output weights times its bias in the constant that the layer adds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.errors import SteeringError
from confsteer.profile.profile import Profile
from confsteer.steering import Steering


class LinearEdit(NamedTuple):
    """A steering that multiplies activations and adds to them, and does nothing else."""

    neurons: Tensor
    """Indices of the profile's neurons, ``[neurons]``."""
    gain: Tensor
    """float64 ``[neurons]``"""
    bias: Tensor
    """float64 ``[neurons]``"""

    def constant(self, writes: Tensor) -> Tensor:
        """Add up what the neurons write without being active.

        Args:
            writes: original output weights of these neurons, ``[neurons, d_model]``.

        Returns:
            Σ bias · write, float64 ``[d_model]``.
        """
        return self.bias @ writes.double()

    @property
    def changed(self) -> tuple[int, ...]:
        """Indices of the neurons that are steered."""
        return tuple(self.neurons[(self.gain != 1) | (self.bias != 0)].tolist())


def linear_edit(steering: Steering, profile: Profile) -> LinearEdit:
    """Translate a steering into gain and bias of each of the profile's neurons.

    Raises:
        SteeringError: there is more to the steering than these, or see `Profile.edit`.
        NoNeuronsError: see `Profile.edit`.
    """
    steering = profile.resolve(steering)
    if steering.positions != "all":
        raise SteeringError(
            f"positions={steering.positions}: weights are the same at all positions, and so is what is added to them. Leave it "
            "out: what is generated is the same, and only the predictions within a prompt are not"
        )
    gain, bias, low, high = (torch.from_numpy(column).double() for column in profile.edit(steering))
    # A clamp to one value is linear.
    fixed = low == high
    gain, bias = torch.where(fixed, 0.0, gain), torch.where(fixed, low, bias)
    ranged = ~fixed & (low.isfinite() | high.isfinite())
    if ranged.any():
        neurons = ", ".join(str(neuron.key) for neuron, is_ranged in zip(profile.steerable, ranged, strict=True) if is_ranged)
        raise SteeringError(
            f"{steering}: a range is not linear, so weights cannot keep neuron {neurons} in one; clamp to a single value, or "
            "steer while the model runs"
        )
    return LinearEdit(torch.tensor([neuron.index for neuron in profile.steerable]), gain, bias)
