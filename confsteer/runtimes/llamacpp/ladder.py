"""The same steering at several settings of a dial, a file for each."""

from __future__ import annotations

import re

import numpy as np

from confsteer.errors import SteeringError
from confsteer.steering import DIALS, Steering

NUMBER = r"([+-]?\d+(?:\.\d+)?)"
LADDER = re.compile(rf"({'|'.join(DIALS)})={NUMBER}:{NUMBER}:(\d+)")
MAX_STEPS = 100
DIGITS = 3
"""Decimals of a nat in a step, and in its file's name."""


def ladder(text: str, base: Steering) -> dict[str, Steering]:
    """Make a steering at evenly spaced settings of a dial, by a suffix for the names of their files.

    Args:
        text: such as ``entropy=-0.3:1:8``, eight settings from −0.3 to 1. Neutral is left out, because it needs no file.
        base: the rest of the steering.

    Raises:
        SteeringError: the text is malformed, or the base turns the dial already.
    """
    found = LADDER.fullmatch(text)
    if found is None:
        raise SteeringError(f"{text!r} is not DIAL=LOW:HIGH:STEPS, such as entropy=-0.3:1:8")
    dial, low, high, steps = found[1], float(found[2]), float(found[3]), int(found[4])
    values = dict.fromkeys(float(value) for value in np.linspace(low, high, steps).round(DIGITS))
    if not (2 <= steps <= MAX_STEPS and low < high and len(values) == steps):
        raise SteeringError(
            f"{text!r}: a ladder rises from LOW to HIGH in 2 to {MAX_STEPS} steps of {10**-DIGITS:g} nats or more"
        )
    if getattr(base, dial) is not None:
        raise SteeringError(f"{base}: the ladder turns the {dial} dial itself; leave it out of --steer")
    return {f"{dial}{value:+.{DIGITS}f}": base.model_copy(update={dial: value}) for value in values if value}
