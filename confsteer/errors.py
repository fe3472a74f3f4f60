"""Everything confsteer raises on purpose.

ConfsteerError
├── UnsupportedServerError     this release of vLLM, or the way it is set up, is not one confsteer can steer
├── LoadError                  a model, its tokenizer or its weights cannot be read
├── UnsupportedModelError      the model's last layer is not one confsteer can steer; the message names what failed
├── NoNeuronsError             the model (or profile) has no neurons of the kind asked for
├── CorpusError                the text cannot be used
├── SettingError               a setting of a measurement is out of its range
├── ResultError                a file of results, or a baked checkpoint, cannot be read or written
├── ResumeError                a calibration cannot go on from what an interrupted one left
├── SteeringError              a steering request is wrong or out of reach
└── ProfileError               a profile cannot be used
    ├── ProfileNotFoundError   no such folder, shipped profile or hub repository
    ├── ProfileVersionError    written by a version of confsteer this one does not know
    ├── ProfileCorruptError    truncated, tampered with, or not a profile
    └── ProfileMismatchError   a good profile, of another model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ConfsteerError(Exception):
    """Base of every error confsteer raises on purpose. The message is a sentence for the user."""


class LoadError(ConfsteerError):
    """A model, its tokenizer or its weights cannot be read."""


class UnsupportedModelError(ConfsteerError):
    """The model's last layer is not one confsteer can measure and steer."""


class UnsupportedServerError(ConfsteerError):
    """This release of vLLM, or the way it is set up, is not one confsteer can steer."""


class NoNeuronsError(ConfsteerError):
    """There are no neurons of the kind asked for."""


class CorpusError(ConfsteerError):
    """The text given cannot be used."""


class SettingError(ConfsteerError, ValueError):
    """A setting of a measurement is out of its range."""


class ResultError(ConfsteerError):
    """A file of results, or a baked checkpoint, cannot be read or written."""


class ResumeError(ConfsteerError):
    """A calibration cannot go on from what an interrupted one left."""


class SteeringError(ConfsteerError, ValueError):
    """A steering request is malformed, out of reach, or does not fit where it is used."""


class ProfileError(ConfsteerError):
    """A profile cannot be used."""


class ProfileNotFoundError(ProfileError):
    """Neither a folder, nor a shipped profile, nor a hub repository."""


class ProfileVersionError(ProfileError):
    """The profile's format version is unknown to this confsteer."""


class ProfileCorruptError(ProfileError):
    """The profile is truncated, tampered with, or not a profile at all."""


class ProfileMismatchError(ProfileError):
    """The profile belongs to another model."""


# A traceback calls an error as the user imports it.
for _error in [value for value in vars().values() if isinstance(value, type)]:
    _error.__module__ = "confsteer"
del _error


def first_problem(error: ValidationError, *, whole: str, prefix: str = "") -> str:
    """Say the first problem that pydantic found: ``layer.null_dims: Input should be greater than 0``.

    Args:
        error: what pydantic raised; one problem is enough for a sentence.
        whole: what to call the document where the problem is in no key.
        prefix: keys that lead to the document, to go before the problem's own.
    """
    first = error.errors()[0]
    keys = [prefix, *(str(part) for part in first["loc"] if part != "[key]")]
    return f"{'.'.join(filter(None, keys))[:80] or whole}: {first['msg'].removeprefix('Value error, ')}"
