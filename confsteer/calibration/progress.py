"""The file that an interrupted calibration goes on from: what its passes have added up so far."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from confsteer.errors import ResumeError
from confsteer.files import folder_for_writing, write_atomically

FILE_NAME = ".calibration.safetensors"
"""Name of the file, in the folder that the profile is to be written to."""
WRITE_INTERVAL_SECONDS = 60.0
"""A run that is killed loses at most this much work, besides the batches that were being worked on."""


class Progress:
    """The sums of every pass, and how many batches are in them.

    The file is replaced in one step, so it is whole whenever the process dies.
    """

    def __init__(self, file: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            file: where to write; None: nothing is kept.
            settings: all that the result depends on, by name, as JSON has it.
            resume: whether to go on from the file, if there is one.

        Raises:
            ResumeError: the file is of other settings, or damaged.
        """
        self._file, self._settings = file, settings
        self._tensors = _read(file, settings) if file and resume and file.exists() else {}
        self._written = time.monotonic()

    def track(self, name: str, sums: Sequence[Tensor]) -> Tensor:
        """Fill the sums of a pass from the file, and write them from now on.

        Args:
            name: of the pass.
            sums: what the pass adds up, **in place**.

        Returns:
            How many batches are in the sums, a scalar int64; the caller adds to it in place.
        """
        batches = torch.tensor(0)
        for number, tensor in enumerate((batches, *sums)):
            key = f"{name}.{number}"
            if key in self._tensors:
                tensor.copy_(self._tensors[key])
            self._tensors[key] = tensor
        return batches

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute what is decided between passes, unless the file has it."""
        if name not in self._tensors:
            self._tensors[name] = compute()
        return self._tensors[name]

    def write_if_due(self) -> None:
        """Write the file, if that was last done `WRITE_INTERVAL_SECONDS` ago."""
        if self._file is None or time.monotonic() < self._written + WRITE_INTERVAL_SECONDS:
            return
        tensors = {name: tensor.cpu() for name, tensor in self._tensors.items()}
        metadata = {"settings": json.dumps(self._settings), "sha256": _sha256(tensors)}
        try:
            with folder_for_writing(self._file.parent):
                write_atomically(self._file, safetensors.torch.save(tensors, metadata))
        except OSError as error:
            # The calibration itself can still end well, so it goes on.
            warnings.warn(f"cannot write {self._file}: {error.strerror}; --resume would not find it", stacklevel=2)
        self._written = time.monotonic()


def sample_of_weights(model: nn.Module) -> str:
    """Hash a few numbers of every parameter.

    A fine-tuned model has the fingerprints of the original, if those of its last layer were frozen.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        # Offloaded weights are not there, and quantised ones are not plain numbers.
        if type(parameter.data) is Tensor and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            digest.update(flat[:: max(1, len(flat) // 64)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118  not a dict
        theirs, damaged = json.loads(metadata["settings"]), metadata["sha256"] != _sha256(tensors)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"cannot read {file}: {error}. Without --resume calibration starts anew") from error
    if damaged:
        raise ResumeError(f"{file} is damaged: its checksum is wrong. Without --resume calibration starts anew")
    differing = [name for name in settings if theirs.get(name) != settings[name]]
    if differing:
        raise ResumeError(
            f"{file} is of another calibration, which differs in: {', '.join(differing)}. Give the same model, text and options, "
            "or start anew without --resume"
        )
    return tensors


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(dict(tensors))).hexdigest()
