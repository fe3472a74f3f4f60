"""A steering as numbers, in the form that vLLM's worker has on the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from confsteer.profile.profile import Profile
from confsteer.steering import Steering


def edit_of(profile: Profile, steering: Steering) -> NDArray[np.float32]:
    """Translate a steering into gain, bias, low and high, ``[4, columns]``.

    Columns are those of `Profile.steerable`. A null direction is one more, the last. It is an imaginary neuron, never active,
    that writes right before the final norm.

    Raises:
        SteeringError, NoNeuronsError: see `Profile.edit`.
    """
    edit = np.stack(profile.edit(steering))
    if profile.null_direction is None:
        return edit
    constant = np.array([1.0, profile.null_write(steering), -np.inf, np.inf], dtype=np.float32)
    return np.concatenate([edit, constant[:, None]], axis=1)
