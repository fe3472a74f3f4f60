from __future__ import annotations

import subprocess
import sys

import confsteer
from confsteer import errors


def test_the_public_names_are_exactly_these() -> None:
    assert set(confsteer.__all__) == {name for name, value in vars(confsteer).items() if _is_public(name, value)}
    assert confsteer.__all__ == sorted(confsteer.__all__)


def _is_public(name: str, value: object) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", "").startswith("confsteer")


def test_every_error_is_a_confsteer_error_and_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for name, value in vars(errors).items():
        if isinstance(value, type):
            assert issubclass(value, errors.ConfsteerError)
            assert name in errors.__doc__
            assert name in confsteer.__all__


def test_importing_confsteer_is_light() -> None:
    heavy = ("vllm", "matplotlib", "torchmetrics", "datasets", "peft")
    code = f"import sys, confsteer; loaded = [m for m in {heavy} if m in sys.modules]; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_science_does_not_know_of_models_or_files() -> None:
    from pathlib import Path

    package = Path(confsteer.__file__).parent
    for file in (package / "discovery").glob("*.py"):
        text = file.read_text()
        for other in ("transformers", "pathlib", "safetensors", "confsteer.anatomy", "confsteer.profile", "pydantic"):
            assert f"import {other}" not in text
            assert f"from {other}" not in text
