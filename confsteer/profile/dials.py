"""Effect of a dial on each calibration text, and the temperature that equals it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from confsteer.profile.profile import Profile
from confsteer.profile.schema import Response
from confsteer.steering import DIALS, Dial, Steering


class DialEffect(NamedTuple):
    """Effects of a dial at one setting, as far as the profile has them."""

    asked: float
    """Change in the dial's own units, nats, the mean over texts."""
    over_texts: tuple[float, float] | None
    """Smallest and largest change on any text, nats. None if the profile is of a single text."""
    temperature: float | None
    """Temperature at which the unsteered model has the same mean entropy. None if it is out of range, or if the profile is older
    than this field."""
    temperatures_over_texts: tuple[float, float] | None
    """Smallest and largest temperature on any text. None if one of them is not known, or the profile is of a single text."""

    def __str__(self) -> str:
        """Write the known effects in a phrase, empty if there are none."""
        parts = []
        if self.over_texts is not None:
            parts.append("{:+.3f} to {:+.3f} nats over the calibration texts".format(*self.over_texts))
        if self.temperature is not None:
            spread = self.temperatures_over_texts
            parts.append(f"as a temperature {self.temperature:.3f}" + (" ({:.3f} to {:.3f})".format(*spread) if spread else ""))
        return ", ".join(parts)


def dial_effect(profile: Profile, dial: Dial, change: float) -> DialEffect:
    """Look up the effect of a dial at one setting on each text of the calibration, and the temperature that equals it.

    Args:
        profile: the profile with the dial.
        dial: its name.
        change: the change asked for, nats.

    Raises:
        NoNeuronsError, SteeringError: see `Profile.dial_position`.
    """
    position = profile.dial_position(dial, change)
    of_texts = [curves[dial] for curves in profile.responses_by_text.values()]
    changes = [float(np.interp(position, curve.position, curve.change(dial))) for curve in of_texts]
    temperatures = [_temperature(curve, position) for curve in of_texts]
    known = [temperature for temperature in temperatures if temperature is not None]
    return DialEffect(
        asked=change,
        over_texts=_range(changes),
        temperature=_temperature(profile.response[dial], position),
        temperatures_over_texts=_range(known) if len(known) == len(temperatures) else None,
    )


def example_effects(profile: Profile, dial: Dial) -> list[DialEffect]:
    """Look up the effects at both ends of a dial's reach and at half of each, to show a dial without a setting.

    Raises:
        NoNeuronsError: the model has no neurons of this kind.
    """
    low, high = profile.reach(dial)
    asked = dict.fromkeys((low, low / 2, high / 2, high))
    return [dial_effect(profile, dial, change) for change in asked if change]


def steering_effects(profile: Profile, steering: Steering) -> dict[Dial, DialEffect]:
    """Look up the effect of each dial that a steering turns, as if it were turned alone.

    Raises:
        NoNeuronsError, SteeringError: the profile cannot apply the steering.
    """
    steering = profile.resolve(steering)
    return {dial: dial_effect(profile, dial, change) for dial in DIALS if (change := getattr(steering, dial))}


def _temperature(curve: Response, position: float) -> float | None:
    """Interpolate between positions. None if one of the two has no temperature."""
    if not curve.temperature:
        return None
    values = [np.nan if value is None else value for value in curve.temperature]
    found = float(np.interp(position, curve.position, values))
    return None if np.isnan(found) else found


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if values else None
