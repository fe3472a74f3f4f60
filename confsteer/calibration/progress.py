"""The file from which an interrupted calibration goes on: the sums of its passes so far."""

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
"""Name of the file, in the folder for the profile."""
WRITE_INTERVAL_SECONDS = 60.0
"""Most work, in seconds, that a killed run loses, besides its unfinished batches."""


class Progress:
    """The sums of every pass, and the number of batches in them.

    The file is replaced in one step, so it is whole whenever the process dies.
    """

    def __init__(self, file: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            file: where to write. None: nothing is kept.
            settings: everything that the result depends on, by name, as JSON.
            resume: whether to go on from the file, if there is one.

        Raises:
            ResumeError: the file is damaged, or its settings are others.
        """
        self._file, self._settings = file, settings
        self._tensors = _read(file, settings) if file and resume and file.exists() else {}
        self._written = time.monotonic()

    def track(self, name: str, sums: Sequence[Tensor]) -> Tensor:
        """Fill the sums of a pass from the file, and include them in the file from now on.

        Args:
            name: name of the pass.
            sums: the tensors that the pass adds to. They are filled **in place**.

        Returns:
            The number of batches in the sums, a scalar int64. The caller adds to it in place.
        """
        batches = torch.tensor(0)
        for number, tensor in enumerate((batches, *sums)):
            key = f"{name}.{number}"
            if key in self._tensors:
                tensor.copy_(self._tensors[key])
            self._tensors[key] = tensor
        return batches

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a decision between passes, unless the file has it."""
        if name not in self._tensors:
            self._tensors[name] = compute()
        return self._tensors[name]

    def write_if_due(self) -> None:
        """Write the file, if the last write was `WRITE_INTERVAL_SECONDS` ago or more."""
        if self._file is None or time.monotonic() < self._written + WRITE_INTERVAL_SECONDS:
            return
        tensors = {name: tensor.cpu() for name, tensor in self._tensors.items()}
        metadata = {"settings": json.dumps(self._settings), "sha256": _sha256(tensors)}
        try:
            with folder_for_writing(self._file.parent):
                write_atomically(self._file, safetensors.torch.save(tensors, metadata))
        except OSError as error:
            # Go on: the calibration itself can still end well.
            warnings.warn(f"cannot write {self._file}: {error.strerror}; --resume would not find it", stacklevel=2)
        self._written = time.monotonic()


def sample_of_weights(model: nn.Module) -> str:
    """Hash a few numbers of every parameter.

    A fine-tuned model can have the fingerprints of the original, if its last layer was frozen.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        # Skip offloaded weights, which are not there, and quantised ones, which are not plain numbers.
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
