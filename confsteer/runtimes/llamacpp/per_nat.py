"""A dial as a control vector whose scale is read in nats, and the error of that reading.

A control vector is scaled linearly, and so is the position of a dial. But the entropy's response to a dial is a curve. Near
neutral the curve is a line.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from confsteer.errors import SteeringError
from confsteer.profile.profile import Profile
from confsteer.runtimes.llamacpp.parts import Parts
from confsteer.steering import DIALS, Dial, Steering

STEPS = 4
"""Number of scales on each side of neutral with a reading."""


class Reading(NamedTuple):
    """A scale read as nats, beside the value of the profile's curve."""

    scale: float
    """Nats by the reading."""
    change: float | None
    """Nats by the curve. None out of the measured range."""


def per_nat(parts: Parts, profile: Profile) -> Parts:
    """Scale the constant of a dial to one nat near neutral, by the slope of the profile's curve there.

    Raises:
        SteeringError: the steering turns more than one dial, or changes something else.
    """
    dial = the_dial(parts.steering)
    assert parts.constant is not None
    position = profile.dial_position(dial, getattr(parts.steering, dial))
    return parts._replace(constant=parts.constant / position / _slope(profile, dial))


def the_dial(steering: Steering) -> Dial:
    """Name the one dial that a steering turns.

    Raises:
        SteeringError: it turns none or both, or changes something else.
    """
    turned = [dial for dial in DIALS if getattr(steering, dial)]
    if len(turned) != 1 or steering != Steering.parse({turned[0]: getattr(steering, turned[0])}):
        raise SteeringError(f"{steering}: a scale can be read in nats for one dial alone, such as entropy=0.3")
    return turned[0]


def readings(profile: Profile, dial: Dial) -> list[Reading]:
    """List the effects of scales within the dial's reach, by the profile's curve, in the units of the dial.

    Raises:
        NoNeuronsError: see `Profile.require_neurons`.
    """
    curve, slope = profile.require_neurons(dial), _slope(profile, dial)
    low, high = profile.reach(dial)
    scales = [*(low * i / STEPS for i in range(STEPS, 0, -1)), *(high * i / STEPS for i in range(1, STEPS + 1))]
    changes = curve.change(dial)

    def change(scale: float) -> float | None:
        position = scale / slope
        measured = curve.position[0] <= position <= curve.position[-1]
        return float(np.interp(position, curve.position, changes)) if measured else None

    return [Reading(scale, change(scale)) for scale in scales if scale]


def _slope(profile: Profile, dial: Dial) -> float:
    """Compute a dial's change in nats per position, at neutral."""
    curve = profile.require_neurons(dial)
    return float(np.gradient(curve.change(dial), curve.position)[curve.zero])
