"""Files that stock llama.cpp reads beside a model: a control vector and a LoRA.

llama.cpp reads no metadata of a control vector. Of a LoRA it reads only kind, architecture and alpha. The rest is for people:
the model, the steering, and the reach of the dials.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from confsteer.errors import SteeringError, UnsupportedModelError
from confsteer.files import write_result
from confsteer.model.checkpoint import LastLayer
from confsteer.playground.description import public_name
from confsteer.profile.profile import Profile
from confsteer.runtimes.llamacpp.after_norm import DialAfterNorm
from confsteer.runtimes.llamacpp.parts import Parts, no_constant, split
from confsteer.runtimes.llamacpp.per_nat import per_nat, the_dial
from confsteer.steering import Steering

SEPARATORS = ",:"
"""Characters that a file's name must not have: llama.cpp splits lists at the first, and reads a scale after the second."""


class Exported(NamedTuple):
    """The files of a steering."""

    parts: Parts
    """Contents of the files."""
    control_vector: Path | None
    """File of the constant. None if there is none."""
    lora: Path | None
    """File of the gains. None if there are none."""
    scale: float | None
    """Scale for the control vector. None for 1."""
    halves: tuple[float, float] | None = None
    """Change of the mean entropy on each half of a text, in nats, if the constant was measured on one."""

    @property
    def options(self) -> str:
        """Options of ``llama-server`` and ``llama-cli`` that use the files."""
        words = [] if self.lora is None else ["--lora", str(self.lora)]
        if self.control_vector is not None:
            scaled = ["--control-vector-scaled", f"{self.control_vector}:{self.scale:g}"] if self.scale else None
            words += scaled or ["--control-vector", str(self.control_vector)]
            words += ["--control-vector-layer-range", *[str(self.parts.layer)] * 2]
        return shlex.join(words)


def export(
    steering: Steering,
    profile: Profile,
    last: LastLayer,
    *,
    control_vector: Path | None = None,
    lora: Path | None = None,
    scale_per_nat: bool = False,
    after_norm: DialAfterNorm | None = None,
) -> Exported:
    """Write a steering as files that llama.cpp reads without conversion.

    Args:
        steering: a linear steering.
        profile: the model's profile.
        last: the model's last layer, as it is on disk.
        control_vector: file for the constant part.
        lora: file for the gains, with a rank per neuron. A scale of s makes a gain 1 + s · (gain − 1).
        scale_per_nat: whether the control vector's scale is in nats of the one dial that is turned.
        after_norm: the entropy dial of a model with a norm on the MLP's output. No other constant has a place there.

    Raises:
        SteeringError: see `confsteer.runtimes.llamacpp.parts.split`. Or a part of the steering has no file, or a file has no
            part. Or it adds a constant before a norm. Or llama.cpp would not find a file with this name.
        UnsupportedModelError: see there. Or the model has a single layer, for which llama.cpp has no control vector.
        NoNeuronsError, ProfileMismatchError: see there.
        ResultError: a file cannot be written.
    """
    parts = split(steering, profile, last)
    scale = halves = None
    if parts.normed:
        change = parts.steering.entropy
        if after_norm is None or scale_per_nat or change is None or parts.steering != Steering(entropy=change):
            raise no_constant(parts.steering, profile)
        constant, halves = after_norm.at(change)
        parts = parts._replace(constant=constant)
    elif scale_per_nat:
        scale = getattr(parts.steering, the_dial(parts.steering))
        parts = per_nat(parts, profile)
    _check_files(parts, control_vector, lora)
    if parts.constant is not None and parts.layer == 0:
        raise UnsupportedModelError(f"{profile.model.id} has a single layer, and llama.cpp adds no control vector to the first")
    says = _origin(parts, profile)
    if control_vector is not None and parts.constant is not None:
        about = {"controlvector.model_hint": parts.architecture, "controlvector.layer_count": 1}
        about |= {"confsteer.scale": "nats, near neutral" if scale_per_nat else "1 is the steering"}
        if after_norm and halves:
            about |= {"confsteer.measured": "{:+.3f} and {:+.3f} nats on the halves of ".format(*halves) + after_norm.source}
        _write(control_vector, "controlvector", about | says, {f"direction.{parts.layer}": parts.constant})
    if lora is not None:
        rank = len(parts.neurons)
        chosen = torch.zeros(rank, parts.n_neurons)
        chosen[range(rank), parts.neurons] = 1
        # Set alpha to the rank: llama.cpp multiplies by alpha over rank.
        about = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(rank)}
        tensors = {f"{parts.projection}.lora_a": chosen, f"{parts.projection}.lora_b": parts.changes.T}
        _write(lora, parts.architecture, about | says, tensors)
    return Exported(parts, control_vector, lora, scale, halves)


def _check_files(parts: Parts, control_vector: Path | None, lora: Path | None) -> None:
    """
    Raises:
        SteeringError: a part of the steering has no file, or a file has no part. Or llama.cpp would not find a file.
    """
    for kind, file, there, does in (
        ("control-vector", control_vector, parts.constant is not None, "adds a constant"),
        ("lora", lora, bool(parts.neurons), "multiplies activations"),
    ):
        if there and file is None:
            raise SteeringError(f"{parts.steering}: {does}; say where that goes with --to {kind} FILE.gguf")
        if file is not None and not there:
            raise SteeringError(f"{parts.steering}: nothing in it {does}; leave out --to {kind}")
        if any(letter in str(file) for letter in SEPARATORS):
            raise SteeringError(f"{file}: llama.cpp cuts names of files at commas and colons; give another name")


def _origin(parts: Parts, profile: Profile) -> dict[str, Any]:
    """Describe what a file was made from, without the paths of this machine, because it may be passed on."""
    name = public_name(profile.model.id)
    says: dict[str, Any] = {
        "general.name": f"{parts.steering} of {name}",
        "confsteer.model": name,
        "confsteer.layer": parts.layer,
        "confsteer.profile": profile.checksum,
        "confsteer.steering": str(parts.steering),
    }
    for dial in profile.response:
        says |= {f"confsteer.{dial}.{end}": reach for end, reach in zip(("low", "high"), profile.reach(dial), strict=True)}
    return says


def _write(file: Path, architecture: str, says: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a GGUF file of float32 tensors, whole or not at all."""
    import gguf

    with tempfile.TemporaryDirectory(prefix="confsteer-export-") as folder:
        draft = Path(folder) / "draft.gguf"
        writer = gguf.GGUFWriter(draft, architecture)
        add: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        for key, value in says.items():
            add[type(value)](key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_result(file, draft.read_bytes())
