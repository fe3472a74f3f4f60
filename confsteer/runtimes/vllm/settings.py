"""The settings in ``additional_config["confsteer"]``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from confsteer.errors import ProfileError, SettingError, first_problem
from confsteer.profile.profile import Profile
from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.runtimes.vllm.out_of_reach import direction_alone


class Settings(BaseModel):
    """Settings of one engine.

    vLLM hashes them into the name of its compile cache, so that no graph without the edit is reused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    profile: str
    """Folder, shipped name or hub repository."""
    default: dict[str, Any] | str = "{}"
    """Steering of requests that ask for none. It is canonical text after start-up."""
    checksum: str | None = None
    """Checksum of the profile. It is filled in at start-up, for every process to compare with."""
    version: str | None = None
    """Version of confsteer. It is filled in at start-up."""
    direction_alone: bool = False
    """Whether only the null direction is steered, because experts are out of reach. It is filled in at start-up."""
    slots: int | None = None
    """Rows of the table besides the neutral one, a shape in the compiled graph. It is filled in at start-up."""

    @classmethod
    def of(cls, additional_config: Any) -> Settings | None:
        """Read the settings in an engine's ``additional_config``. None if it has none.

        Raises:
            SettingError: they are malformed.
        """
        if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
            return None
        try:
            return cls.model_validate(additional_config[CONFIG_KEY])
        except ValidationError as error:
            raise SettingError(
                f"additional_config: {first_problem(error, whole=CONFIG_KEY, prefix=CONFIG_KEY)}. It should be "
                f'{{"{CONFIG_KEY}": {{"profile": PROFILE}}}}, and may have a "default" steering'
            ) from error

    def load_profile(self) -> Profile:
        """
        Raises:
            ProfileError: there is none, or it is not the one that the engine was configured with.
        """
        profile = Profile.load(self.profile)
        if self.checksum not in (None, profile.checksum):
            raise ProfileError(f"the profile {self.profile} has changed since the server was started: restart it")
        return direction_alone(profile) if self.direction_alone else profile
