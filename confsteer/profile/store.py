"""The folder of a profile: ``profile.json`` and a safetensors file beside it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from confsteer.errors import ProfileCorruptError, ProfileError, ProfileNotFoundError, ProfileVersionError
from confsteer.files import (
    MAX_COLUMNS_BYTES,
    MAX_PROFILE_BYTES,
    folder_for_writing,
    read_at_most,
    shipped_profiles,
    write_atomically,
)
from confsteer.model.layers import dtype_name

FORMAT_VERSIONS = (1, 2, 3)
"""Versions of the format: 3 for profiles with a null direction, 2 for other mixtures of experts, 1 for all other models."""
FILE_NAME = "profile.json"
COLUMNS_PATTERN = "columns-*.safetensors"
WEIGHT_COLUMNS = ("norm", "logit_variance", "null_fraction", "singular_values")
"""Columns that follow from the weights alone. A profile without a corpus has no others."""
MEASURED_COLUMNS = ("mean_activation", "mediation", "frequency", "frequency_mediation")
"""Columns of a profile with a corpus that other results are computed from."""

DIRECTION_COLUMN = "null_direction"
"""Column of a profile with a null direction: as many numbers as the residual's dimension."""


def find_profile(source: str | os.PathLike[str]) -> Path:
    """Find a profile: a folder, the name of one in ``calibrations/``, or a hub repository, which is downloaded.

    Raises:
        ProfileNotFoundError: it is none of these.
    """
    path = Path(source)
    try:
        if (path / FILE_NAME).is_file():
            return path
        if path.is_dir():
            raise ProfileNotFoundError(f"{path} has no {FILE_NAME}: it is not a profile")
    except OSError as error:
        raise ProfileNotFoundError(f"cannot read {path}: {error.strerror}") from error
    name = str(source)
    shipped = shipped_profiles()
    if name in shipped:
        return shipped[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            downloaded = Path(snapshot_download(name, allow_patterns=[FILE_NAME, COLUMNS_PATTERN]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ProfileNotFoundError(f"no folder {name}, and the hub gave no such repository: {reason}") from error
        if not (downloaded / FILE_NAME).is_file():
            raise ProfileNotFoundError(f"the hub repository {name} has no {FILE_NAME}: it is not a profile")
        return downloaded
    raise ProfileNotFoundError(
        f"no profile {name!r}: give a folder, a hub repository (OWNER/NAME), or one of "
        f"{', '.join(sorted(shipped)) or '(none shipped)'}"
    )


def format_version(fields: Mapping[str, Any]) -> int:
    """Choose the version of the format for a profile with these fields."""
    if fields.get("null_direction") is not None:
        return 3
    return 2 if "experts" in fields["model"] else 1


def checksum(fields: Mapping[str, Any]) -> str:
    """SHA-256 of a profile's fields as JSON, with sorted keys, and of the format version."""
    canonical = json.dumps([format_version(fields), fields], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write(folder: Path, fields: Mapping[str, Any], columns_file: str, columns: Mapping[str, Tensor]) -> None:
    """Write a profile to `folder`, in place of the one there.

    The columns are written first, under a name made from their hash. Then ``profile.json`` replaces the old one in a single
    step. Whenever the process dies, the folder holds the old profile or the new one, whole.

    Args:
        folder: where to write. It is made if it does not exist.
        fields: the profile's fields as JSON has them.
        columns_file: name of the file for the columns.
        columns: the columns by name, a row of numbers each.

    Raises:
        ProfileError: it cannot be written, or would be larger than `MAX_PROFILE_BYTES`.
    """
    document = {"format_version": format_version(fields), **fields, "checksum": checksum(fields)}
    payload = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
    if len(payload) > MAX_PROFILE_BYTES:
        raise ProfileError(
            f"the profile has {len(payload):,} bytes of JSON, at most {MAX_PROFILE_BYTES:,} can be read: fewer presets"
        )
    new_columns = folder / columns_file
    is_new = not new_columns.exists()
    try:
        with folder_for_writing(folder):
            write_atomically(new_columns, safetensors.torch.save(dict(columns)))
            try:
                write_atomically(folder / FILE_NAME, payload)
            except OSError:
                if is_new:
                    new_columns.unlink(missing_ok=True)
                raise
            for old in folder.glob(COLUMNS_PATTERN):
                if old.name != columns_file:
                    old.unlink()
    except OSError as error:
        raise ProfileError(f"cannot write the profile to {folder}: {error.strerror}") from error


class Stored(NamedTuple):
    """A ``profile.json`` of a known version, whose fields are not checked yet."""

    file: Path
    version: int
    fields: dict[str, Any]
    checksum: Any

    def check(self) -> None:
        """
        Raises:
            ProfileCorruptError: the checksum does not fit the fields.
        """
        if self.checksum != checksum(self.fields) or self.version != format_version(self.fields):
            raise ProfileCorruptError(
                f"{self.file} was changed after it was written (its checksum does not fit). Calibrate again, or get a fresh copy"
            )


def read(file: Path) -> Stored:
    """Read a ``profile.json``.

    Raises:
        ProfileNotFoundError: it cannot be read.
        ProfileVersionError: its format is unknown.
        ProfileCorruptError: it is not a JSON object.
    """
    document = _read_document(file)
    version = document.pop("format_version", None)
    if version not in FORMAT_VERSIONS or isinstance(version, bool):
        raise ProfileVersionError(
            f"{file} has format version {version!r}; this confsteer reads versions {', '.join(map(str, FORMAT_VERSIONS))}. "
            "Upgrade confsteer, or calibrate again"
        )
    return Stored(file, version, document, document.pop("checksum", None))


def _read_document(file: Path) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ProfileCorruptError(f"{file} has a key twice")
        return dict(pairs)

    try:
        document = json.loads(read_at_most(file, MAX_PROFILE_BYTES), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ProfileCorruptError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise ProfileNotFoundError(f"cannot read {file}: {error.strerror}") from error
    if not isinstance(document, dict):
        raise ProfileCorruptError(f"{file} is not a JSON object")
    return document


def read_columns(
    file: Path, sha256: str, *, n_neurons: int, null_dims: int, measured: bool, direction: int | None
) -> dict[str, Tensor]:
    """Read the statistics of every neuron of the layer, ``[n_neurons]`` each, and the unembedding's ``singular_values``.

    Args:
        file: the file beside ``profile.json``, which names it.
        sha256: its hash in ``profile.json``.
        n_neurons: number of neurons in the layer.
        null_dims: directions of the null space. There must be more singular values than these.
        measured: whether the columns of a profile with a corpus must be there.
        direction: length that the column of a null direction must have. None if there is no null direction.

    Raises:
        ProfileCorruptError: it cannot be read, or does not fit ``profile.json``.
    """
    try:
        payload = read_at_most(file, MAX_COLUMNS_BYTES)
    except OSError as error:
        raise ProfileCorruptError(f"cannot read {file}, which the profile names: {error.strerror}") from error
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise ProfileCorruptError(f"{file} is truncated or was changed after it was written (its SHA-256 does not fit)")
    try:
        columns = safetensors.torch.load(payload)
    except (safetensors.SafetensorError, KeyError) as error:  # a KeyError of a data type that torch does not have
        raise ProfileCorruptError(f"{file} is not a safetensors file that can be read: {error}") from error
    for name in (*WEIGHT_COLUMNS, *(MEASURED_COLUMNS if measured else ()), *([DIRECTION_COLUMN] if direction else ())):
        if name not in columns:
            raise ProfileCorruptError(f"{file} has no column {name!r}")
    for name, column in columns.items():
        if column.dtype not in (torch.float32, torch.float64) or column.dim() != 1:
            raise ProfileCorruptError(
                f"{file}: {name} is {dtype_name(column.dtype)} {list(column.shape)}; a column is a row of float32 or float64"
            )
        if direction and name == DIRECTION_COLUMN:
            if len(column) != direction or not abs(float(column.double().norm()) - 1) < 1e-3:
                raise ProfileCorruptError(f"{file}: {name} must be {direction} numbers with a length of 1")
        elif name != "singular_values" and len(column) != n_neurons:
            raise ProfileCorruptError(f"{file}: {name} is of {len(column)} neurons, the layer has {n_neurons}")
    spectrum = columns["singular_values"]
    if not (len(spectrum) > null_dims and spectrum.isfinite().all()):
        raise ProfileCorruptError(f"{file}: singular_values must be more numbers than the {null_dims} of the null space")
    return columns
