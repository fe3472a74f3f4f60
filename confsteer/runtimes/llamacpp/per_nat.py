"""A dial as a control vector whose scale is read in nats, and how wrong that reading is.

A control vector is scaled linearly, and so is the position of a dial; what the dial does to the entropy is a curve. Near
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
"""Scales on each side of neutral that a reading is given at."""


class Reading(NamedTuple):
    """A scale read as nats, beside what the profile's curve says of it."""

    scale: float
    """Nats that the reading says."""
    change: float | None
    """Nats that the curve says; None beyond what was measured."""


def per_nat(parts: Parts, profile: Profile) -> Parts:
    """Make the constant of a dial the one for a nat near neutral, by the slope of the profile's curve there.

    Raises:
        SteeringError: the steering turns more than one dial, or something else than a dial.
    """
    dial = the_dial(parts.steering)
    assert parts.constant is not None
    position = profile.dial_position(dial, getattr(parts.steering, dial))
    return parts._replace(constant=parts.constant / position / _slope(profile, dial))


def the_dial(steering: Steering) -> Dial:
    """Name the one dial that a steering turns.

    Raises:
        SteeringError: it turns none or both, or does something else.
    """
    turned = [dial for dial in DIALS if getattr(steering, dial)]
    if len(turned) != 1 or steering != Steering.parse({turned[0]: getattr(steering, turned[0])}):
        raise SteeringError(f"{steering}: a scale can be read in nats for one dial alone, such as entropy=0.3")
    return turned[0]


def readings(profile: Profile, dial: Dial) -> list[Reading]:
    """List what scales within the dial's reach do, by the profile's curve, in the units of the dial.

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
    """Nats that a dial does per position, at neutral."""
    curve = profile.require_neurons(dial)
    return float(np.gradient(curve.change(dial), curve.position)[curve.zero])
