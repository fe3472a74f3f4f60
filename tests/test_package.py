from __future__ import annotations

import subprocess
import sys

import pytest

import confsteer
from confsteer import errors


def test_every_public_name_is_there_and_no_other() -> None:
    assert confsteer.__all__ == sorted(confsteer.__all__) == dir(confsteer)
    for name in confsteer.__all__:
        assert getattr(confsteer, name).__module__.startswith("confsteer.")
        assert getattr(confsteer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'calibration_'"):
        _ = confsteer.calibration_


def test_every_error_is_a_confsteer_error_and_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for name, value in vars(errors).items():
        if isinstance(value, type):
            assert issubclass(value, errors.ConfsteerError)
            assert name in errors.__doc__
            assert name in confsteer.__all__


def test_importing_confsteer_is_light() -> None:
    heavy = ("torch", "transformers", "pydantic", "vllm", "matplotlib", "torchmetrics", "datasets", "peft")
    code = f"import sys, confsteer, confsteer.vllm; loaded = [m for m in {heavy} if m in sys.modules]; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_science_does_not_know_of_models_or_files() -> None:
    from pathlib import Path

    package = Path(confsteer.__file__).parent
    for file in (package / "discovery").glob("*.py"):
        text = file.read_text()
        for other in ("transformers", "pathlib", "safetensors", "confsteer.anatomy", "confsteer.profile", "pydantic"):
            assert f"import {other}" not in text
            assert f"from {other}" not in text
