from __future__ import annotations

from typing import Any

import pytest

import confsteer
from confsteer import defaults
from confsteer.cli import main
from confsteer.evaluation.evaluate import EvaluationSettings
from confsteer.tuning.tune import TuningSettings


@pytest.mark.parametrize(("settings", "values"), [(EvaluationSettings, defaults.EVALUATION), (TuningSettings, defaults.TUNING)])
def test_every_setting_has_a_default_and_no_other_does(settings: Any, values: dict[str, Any]) -> None:
    assert list(settings.__annotations__) == list(values)


@pytest.mark.parametrize(("function", "name", "arguments"), [(confsteer.evaluate, "evaluate", 5), (confsteer.tune, "tune", 4)])
def test_an_unknown_keyword_is_refused_as_python_does(function: Any, name: str, arguments: int) -> None:
    with pytest.raises(TypeError) as error:
        function(*[None] * arguments, progres=True)
    assert str(error.value) == f"{name}() got an unexpected keyword argument 'progres'"


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("calibrate", "tokens", 25_600),
        ("calibrate", "window", 256),
        ("tune", "tokens", 40_000),
        ("tune", "ridge", 2e-5),
        ("tune", "objective", "nll"),
        ("eval", "window", 256),
        ("generate", "max_new_tokens", 40),
    ],
)
def test_the_command_line_has_them_as_documented(command: str, option: str, value: object) -> None:
    (parameter,) = [one for one in main.commands[command].params if one.name == option]
    assert parameter.default == value
