"""The rule that every runtime shares: an activation ``a`` becomes ``clip(gain · a + bias, low, high)``.

`confsteer.profile.profile.Profile.edit` turns a steering into the four numbers of each neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from confsteer.last_layer.states import TokenStates


class NeuronEdit(NamedTuple):
    """``a' = clip(gain · a + bias, low, high)`` for each of a profile's neurons, float32 ``[neurons]``."""

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]


NEUTRAL_EDIT = (1.0, 0.0, -np.inf, np.inf)
"""The gain, bias, low and high that change nothing."""


def edited(activations: Tensor, gain: Tensor, bias: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Apply the rule to activations of the profile's neurons, ``[..., neurons]``, in float32; the result has the input's dtype.

    Args:
        activations: the neurons' activations, in the order of `NeuronEdit`.
        gain: a column of `NeuronEdit`, as are the next three, broadcastable against the activations.
        bias: see gain.
        low: see gain.
        high: see gain.
    """
    return torch.clamp(activations.float() * gain + bias, low, high).to(activations.dtype)


def change_of(states: TokenStates, edit: Sequence[Tensor]) -> Tensor:
    """Compute what an edit adds to each activation, float32 ``[tokens, neurons]``: nothing where a neuron is not active.

    Args:
        states: states of some tokens, with the activations of the profile's neurons.
        edit: gain, bias, low and high.
    """
    activations = states.activations.float()
    added = edited(activations, *edit) - activations
    return added if states.active is None else torch.where(states.active, added, 0)
