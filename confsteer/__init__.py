"""Inference-time confidence control for language models, with their own entropy and token-frequency neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from confsteer import demo
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
    from confsteer.model.loading import load_model
    from confsteer.profile.profile import Profile
    from confsteer.profile.schema import Neuron, Response
    from confsteer.runtimes.baking import Baked, bake
    from confsteer.runtimes.transformers import Steerer, steer
    from confsteer.steering import Steering
    from confsteer.text.counts import count_tokens, read_counts
    from confsteer.text.images import with_images
    from confsteer.text.sources import read_texts
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
    "count_tokens",
    "demo",
    "evaluate",
    "load_model",
    "read_counts",
    "read_texts",
    "scan",
    "steer",
    "tune",
    "with_images",
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
    "count_tokens": "text.counts",
    "evaluate": "evaluation.evaluate",
    "load_model": "model.loading",
    "read_counts": "text.counts",
    "read_texts": "text.sources",
    "scan": "calibration.scan",
    "steer": "runtimes.transformers",
    "tune": "tuning.tune",
    "with_images": "text.images",
}
"""The module of each name. Names that are not listed are errors, and `demo` is a module itself."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, and call this package its home.

    vLLM loads this package in each of its processes, whether they need it or not. So nothing heavy may be imported with it.
    """
    if name == "__version__":
        from importlib.metadata import version

        return version("confsteer")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name == "demo":
        return import_module(f"{__name__}.demo")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    _rehome(value)
    globals()[name] = value
    return value


def _rehome(value: Any) -> None:
    """Make a class or a function name this package as its module.

    Annotations are text that has a meaning only in the module where they stand, so they are resolved first.
    """
    from inspect import unwrap
    from typing import get_type_hints

    for one in {unwrap(value), value}:
        hints = get_type_hints(one, include_extras=True)
        one.__annotations__ = {name: hints[name] for name in vars(one).get("__annotations__", one.__annotations__)}
        one.__module__ = __name__


def __dir__() -> list[str]:
    return __all__
