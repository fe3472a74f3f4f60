"""Inference-time confidence control for language models, with their own entropy and token-frequency neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from confsteer.calibration.calibrate import calibrate
    from confsteer.calibration.scan import Scan, scan
    from confsteer.errors import (
        ConfsteerError,
        CorpusError,
        LoadError,
        NoNeuronsError,
        ProfileCorruptError,
        ProfileError,
        ProfileMismatchError,
        ProfileNotFoundError,
        ProfileVersionError,
        ResultError,
        ResumeError,
        SettingError,
        SteeringError,
        UnsupportedModelError,
        UnsupportedServerError,
    )
    from confsteer.evaluation.evaluate import Evaluation, evaluate
    from confsteer.profile.profile import Profile
    from confsteer.profile.schema import Neuron, Response
    from confsteer.runtimes.baking import Baked, bake
    from confsteer.runtimes.transformers import Steerer, steer
    from confsteer.steering import Steering
    from confsteer.tuning.tune import Tuning, tune

__all__ = [
    "Baked",
    "ConfsteerError",
    "CorpusError",
    "Evaluation",
    "LoadError",
    "Neuron",
    "NoNeuronsError",
    "Profile",
    "ProfileCorruptError",
    "ProfileError",
    "ProfileMismatchError",
    "ProfileNotFoundError",
    "ProfileVersionError",
    "Response",
    "ResultError",
    "ResumeError",
    "Scan",
    "SettingError",
    "Steerer",
    "Steering",
    "SteeringError",
    "Tuning",
    "UnsupportedModelError",
    "UnsupportedServerError",
    "bake",
    "calibrate",
    "evaluate",
    "scan",
    "steer",
    "tune",
]

_MODULES = {
    "Baked": "runtimes.baking",
    "Evaluation": "evaluation.evaluate",
    "Neuron": "profile.schema",
    "Profile": "profile.profile",
    "Response": "profile.schema",
    "Scan": "calibration.scan",
    "Steerer": "runtimes.transformers",
    "Steering": "steering",
    "Tuning": "tuning.tune",
    "bake": "runtimes.baking",
    "calibrate": "calibration.calibrate",
    "evaluate": "evaluation.evaluate",
    "scan": "calibration.scan",
    "steer": "runtimes.transformers",
    "tune": "tuning.tune",
}
"""Where a name is; the others are errors."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: vLLM loads this package in each of its processes, wanted or not."""
    if name == "__version__":
        from importlib.metadata import version

        return version("confsteer")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
