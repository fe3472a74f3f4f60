"""Calibrations that survive their process: what was added up so far, in a file that another run goes on from."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from confsteer.errors import ResumeError
from confsteer.files import folder_for_writing, write_atomically
from confsteer.last_layer.states import TokenStates
from confsteer.model.states import Recording, regroup

FILE_NAME = ".calibration.safetensors"
"""In the folder that the profile is to be written to."""
WRITE_INTERVAL_SECONDS = 60.0
"""Seconds between writes: what a run that is killed loses at most, besides the batches that were being worked on."""


class Checkpoint:
    """A calibration is a few passes over a text, each of which adds up tensors: these, and how far each pass has come.

    The file is replaced in one step, so it is whole whenever the process dies.
    """

    def __init__(self, file: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            file: where; None: nothing is kept.
            settings: all that the result depends on, by name, as JSON has it.
            resume: whether to go on from the file, if there is one.

        Raises:
            ResumeError: the file is of other settings, or damaged.
        """
        self._file, self._settings = file, settings
        self._tensors = _read(file, settings) if file and resume and file.exists() else {}
        self._written = time.monotonic()

    def read(
        self,
        name: str,
        recording: Recording,
        sums: Sequence[Tensor],
        on_read: Callable[[int], object],
        *,
        at_least: int = 0,
    ) -> Iterator[TokenStates]:
        """A pass over the text, from where the file says this pass had come to.

        Args:
            name: of the pass.
            recording: the text.
            sums: what the caller adds up, **in place**, from each batch before it asks for the next; filled from the file.
            on_read: see `Recording.read`.
            at_least: tokens in a batch, see `regroup`; batches end where they would have ended without an interruption.
        """
        batches = torch.tensor(0)
        for number, tensor in enumerate((batches, *sums)):
            key = f"{name}.{number}"
            if key in self._tensors:
                tensor.copy_(self._tensors[key])
            self._tensors[key] = tensor

        taken = int(batches)

        def counted() -> Iterator[TokenStates]:
            nonlocal taken
            for states in recording.read(on_read, start=taken):
                taken += 1
                yield states

        for states in regroup(counted(), at_least):
            yield states
            batches.fill_(taken)
            self._write()

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What is decided between passes: computed, unless the file has it."""
        if name not in self._tensors:
            self._tensors[name] = compute()
        return self._tensors[name]

    def _write(self) -> None:
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
    """Hash of a few numbers from every parameter: a fine-tuned model has the fingerprints of the original, if those of its last
    layer were frozen.
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
