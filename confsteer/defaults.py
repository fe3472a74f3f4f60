"""Defaults that the library and the command line share, each once. Nothing heavy is imported here: ``--help`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, cast

WINDOW: Final = 256
"""Tokens per window."""
SOURCE: Final = "texts"
"""Name, in reports and profiles, of a text that was given none."""
SEED: Final = 0

CALIBRATION_TOKENS: Final = 25_600
"""Most tokens that `confsteer.calibrate` reads of each text."""

INDUCTION_SEQUENCES: Final = 100
"""Sequences of each kind in the study of induction."""
INDUCTION_HALF: Final = 100
"""Tokens of a stretch that is read twice."""

CUMULATIVE_TOKENS: Final = 5_120
"""Most tokens that the study of cumulative ablation reads."""
CUMULATIVE_REPEATS: Final = 10
"""Draws of random neurons."""

AFTER_NORM_TOKENS: Final = 2_048
"""Most tokens that are read to measure a dial after the norm on the MLP's output."""

MAX_NEW_TOKENS: Final = 40
"""Most tokens of a continuation."""
TEMPERATURE: Final = 1.0
"""Temperature at which continuations are sampled."""

SAMPLES: Final = 5
"""Samples of an answer in the model's own words. Their agreement is a confidence."""

TUNING_TOKENS: Final = 40_000
"""Most tokens that `confsteer.tune` reads of each text."""
PARAMETERS: Final[Literal["neurons", "dials"]] = "neurons"
OBJECTIVE: Final[Literal["nll", "brier", "ece"]] = "nll"
RIDGE: Final = 2e-5
"""Penalty as a share of the unsteered objective: for a gain that is off by one, or a shift by half of its dial's range."""

EVALUATION: Mapping[str, Any] = MappingProxyType(
    {
        "unigram_counts": None,
        "tokens": None,
        "window": WINDOW,
        "smooth_ece": False,
        "source": SOURCE,
        "progress": False,
    }
)
"""Settings of `confsteer.evaluate`, see `confsteer.evaluation.evaluate.EvaluationSettings`."""
TUNING: Mapping[str, Any] = MappingProxyType(
    {
        "parameters": PARAMETERS,
        "with_temperature": False,
        "objective": OBJECTIVE,
        "ridge": RIDGE,
        "leave_one_out": True,
        "tokens": TUNING_TOKENS,
        "window": WINDOW,
        "seed": SEED,
        "source": SOURCE,
        "progress": False,
    }
)
"""Settings of `confsteer.tune`, see `confsteer.tuning.tune.TuningSettings`."""

Settings = TypeVar("Settings", bound=Mapping[str, object])


def with_defaults(function: str, given: Settings, defaults: Mapping[str, Any]) -> Settings:
    """Fill in the keywords that a caller left out.

    Args:
        function: name of the function that was called, for the message.
        given: keywords it was called with.
        defaults: every keyword it takes, with its default.

    Raises:
        TypeError: a keyword is not among `defaults`.
    """
    for keyword in given:
        if keyword not in defaults:
            raise TypeError(f"{function}() got an unexpected keyword argument {keyword!r}")
    return cast(Settings, {**defaults, **given})
