"""The base of every record that a measurement returns."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """A frozen record; `confsteer eval --json` and its like write it, `confsteer report` reads it."""

    model_config = ConfigDict(frozen=True)
