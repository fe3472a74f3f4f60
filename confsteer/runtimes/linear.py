"""The steerings that weights can hold: ``a' = gain · a + bias`` before a linear layer makes another linear layer.

The new layer has a neuron's output weights times its gain. Its original output weights times its bias join the constant that the
layer adds. A null direction adds a constant of its own, to the residual after the layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.errors import SteeringError
from confsteer.profile.profile import Profile
from confsteer.profile.store import DIRECTION_COLUMN
from confsteer.steering import Steering


class LinearEdit(NamedTuple):
    """A steering that only multiplies activations and adds to them."""

    neurons: Tensor
    """Indices of the profile's neurons, ``[neurons]``."""
    gain: Tensor
    """float64 ``[neurons]``"""
    bias: Tensor
    """float64 ``[neurons]``"""
    residual: Tensor
    """Constant added to the residual before the final norm, after a norm on the MLP's output, float64 ``[d_model]``."""

    def constant(self, writes: Tensor) -> Tensor:
        """Add up what the neurons write at zero activation.

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
        SteeringError: the steering is not linear, or see `Profile.edit`.
        NoNeuronsError: see `Profile.edit`.
    """
    steering = profile.resolve(steering)
    if steering.positions != "all":
        raise SteeringError(
            f"positions={steering.positions}: weights are the same at all positions, and so is what is added to them. "
            + (
                "Leave it out: what is generated is the same, and only the predictions within a prompt are not"
                if steering.positions == "generated"
                else "Steer while the model runs: confsteer.steer, confsteer generate, vLLM"
            )
        )
    gain, bias, low, high = (torch.from_numpy(column).double() for column in profile.edit(steering))
    # Take a clamp to one value as linear.
    fixed = low == high
    gain, bias = torch.where(fixed, 0.0, gain), torch.where(fixed, low, bias)
    ranged = ~fixed & (low.isfinite() | high.isfinite())
    if ranged.any():
        held = ", ".join(str(neuron.key) for neuron, is_ranged in zip(profile.steerable, ranged, strict=True) if is_ranged)
        raise SteeringError(
            f"{steering}: a range is not linear, so weights cannot keep neuron {held} in one; clamp to a single value, or "
            "steer while the model runs"
        )
    neurons = torch.tensor([neuron.index for neuron in profile.steerable], dtype=torch.long)
    residual = torch.zeros(profile.model.d_model, dtype=torch.float64)
    if profile.null_direction is not None:
        residual = profile.null_write(steering) * profile.columns[DIRECTION_COLUMN].double().cpu()
    return LinearEdit(neurons, gain, bias, residual)


def no_weight(steering: Steering, profile: Profile) -> SteeringError:
    """Make the error that says why a null direction has no place in a model's weights."""
    return SteeringError(
        f"{steering}: the null direction of {profile.model.id} ({profile.model.model_type}) is written to the residual, and no "
        "weight adds a constant there: a norm on the MLP's output, or an expert's routing weight, would change it. Steer while "
        "the model runs (confsteer.steer, confsteer generate), or in llama.cpp: confsteer export --to control-vector FILE.gguf"
    )
