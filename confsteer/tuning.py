"""Steering chosen by data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from confsteer.evaluation.bootstrap import Interval
from confsteer.evaluation.comparison import TextComparison
from confsteer.evaluation.fit import Objective
from confsteer.steering import Steering


class Tuning(BaseModel):
    """What tuning found, and what it does to text it has not seen."""

    model_config = ConfigDict(frozen=True)

    model: str
    profile: str
    """Checksum of the profile tuning started from."""
    versions: dict[str, str]
    parameters: Literal["neurons", "dials"]
    objective: Objective
    steering: Steering
    temperature: float | None
    """Tuned together with the steering, to be used with it; None if only the steering was tuned."""
    tokens: dict[str, int]
    """Of the texts together: how many tokens were tuned on, how many chose when to stop, and how many are reported on."""
    validation: Interval
    """Paired difference of the objective to neutral on the validation split, the mean over texts."""
    texts: tuple[TextComparison, ...]
    """Each text's test split."""
    left_out: tuple[TextComparison, ...]
    """Each text's test split with everything fitted on the other texts alone; empty for a single text."""
    steps: int
    seconds: float

    @property
    def gained(self) -> bool:
        """Whether it beats neutral on the validation split beyond the interval."""
        return self.validation.high < 0
