"""A server's description of what it can steer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from confsteer.profile.dials import example_effects
from confsteer.profile.profile import Profile
from confsteer.steering import MADE_BY_HAND


def public_name(source: str) -> str:
    """Return a hub id or a shipped name as it is. Of a path return only the last part: the rest is private."""
    named = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and not Path(source).exists()
    return source if named else Path(source).absolute().name


def describe(profile: Profile) -> dict[str, Any]:
    """Describe model, neurons, ranges of the dials, their effects at four settings, and presets, for JSON."""
    return {
        "model": public_name(profile.model.id),
        "layer": profile.model.layer,
        "dials": {
            dial: {
                "unit": "nats",
                "range": profile.reach(dial),
                "effects": [effect._asdict() for effect in example_effects(profile, dial)],
                "neurons": [neuron.key for neuron in profile.pushed(dial)],
                **({"turns": MADE_BY_HAND} if profile.turns_direction(dial) else {}),
            }
            for dial in profile.response
        },
        "presets": {name: str(steering) for name, steering in profile.presets.items()},
    }
