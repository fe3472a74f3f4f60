"""The base of every record that a measurement returns."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """A frozen record. `confsteer eval --json` and its like write it, and `confsteer report` reads it."""

    model_config = ConfigDict(frozen=True)


class ModelResult(Result):
    """A record of one model."""

    model: str
    """Id of the profile's model."""
    given: str = ""
    """Name of the model on the command line."""

    @property
    def name(self) -> str:
        """Name of the model for reports: what the user called it."""
        return self.given or self.model
