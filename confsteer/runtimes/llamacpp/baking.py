"""A GGUF file with a steering in its weights: llama.cpp runs it without any option.

All but two tensors, and all the metadata, stay the same byte for byte. The constant is added to the last output projection's
bias. Gains multiply columns of its weight. A quantised weight is then stored in float32. One number in each of its blocks
changes, and quantising the block again would change its neighbours.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.errors import LoadError, ResultError, SteeringError
from confsteer.files import sync_folder, temporary_sibling
from confsteer.model.checkpoint import LastLayer
from confsteer.model.gguf import ALIGNMENT, FLOAT32, MAGIC, STRING, GgufFile, TensorInfo
from confsteer.playground.description import public_name
from confsteer.profile.profile import Profile
from confsteer.runtimes.linear import no_weight
from confsteer.runtimes.llamacpp.parts import Parts, no_constant, split
from confsteer.steering import Steering

READ_A_BIAS = ("gpt2", "llama", "starcoder2")
"""Architectures whose last output projection can have a bias in llama.cpp. It does not load files of others with a bias."""
COUNTS = struct.Struct("<4sIQQ")
"""Head of a file: magic, version, tensors, entries of metadata."""
FLOAT16 = 1
IN_PLACE: dict[int, torch.dtype] = {FLOAT32: torch.float32, FLOAT16: torch.float16, 30: torch.bfloat16}
"""Type of a tensor whose numbers can be changed in place -> its dtype in torch."""
COPIED_AT_ONCE = 1 << 24


class BakedFile(NamedTuple):
    """The changes that `bake_file` made."""

    parts: Parts
    """Steering that was baked."""
    weight: str | None
    """Tensor with the output weights. None if those are unchanged."""
    bias: str | None
    """Tensor that holds the constant now. None if there is none."""
    was_quantised: bool
    """Whether the weight is in float32 now, and was not before."""


def bake_file(steering: Steering, profile: Profile, last: LastLayer, out: Path) -> BakedFile:
    """Write a copy of a GGUF file with a steering in its weights.

    Args:
        steering: whatever is linear.
        profile: profile of the model in the file.
        last: the file's last layer.
        out: file to write. It must not exist yet.

    Raises:
        SteeringError: see `confsteer.runtimes.llamacpp.parts.split`. Or the steering adds a constant, and llama.cpp has no bias
            to hold it.
        NoNeuronsError, ProfileMismatchError: see `confsteer.runtimes.llamacpp.parts.split`.
        LoadError: the file is not laid out as its header says.
        ResultError: `out` exists already, or cannot be written.
    """
    assert last.file is not None
    parts, file = split(steering, profile, last), last.file
    changed = dict[str, Tensor]()
    bias = f"blk.{parts.layer}.ffn_down.bias"
    if parts.constant is not None:
        if last.anatomy.write_norm is not None:
            raise (no_constant if parts.normed else no_weight)(parts.steering, profile)
        if file.architecture not in READ_A_BIAS:
            raise SteeringError(
                f"{parts.steering}: adds a constant, and llama.cpp gives the last MLP of {file.architecture} no bias to hold it. "
                "Write it as a control vector: confsteer export"
            )
        own = file.tensor(bias).double() if bias in file.tensors else torch.zeros_like(parts.constant)
        changed[bias] = (own + parts.constant).float()
    if parts.neurons:
        weight = file.tensor(parts.projection)  # [d_model, n_neurons]
        columns = weight[:, list(parts.neurons)].double() + parts.changes.T
        weight[:, list(parts.neurons)] = columns.float()
        changed[parts.projection] = weight.to(IN_PLACE.get(file.tensors[parts.projection].kind, torch.float32))
    if not all(tensor.isfinite().all() for tensor in changed.values()):
        raise SteeringError(f"{parts.steering}: makes weights that the file's precision cannot hold. Ask for less")
    # Allow a record to be there already: a file may be baked again.
    nth = sum(re.fullmatch(r"confsteer\.\d+\.steering", key) is not None for key in file.metadata)
    said = {"steering": str(parts.steering), "model": public_name(profile.model.id), "profile": profile.checksum}
    record = {f"confsteer.{nth}.{key}": value for key, value in said.items()}
    _write(file, changed, record, out)
    quantised = bool(parts.neurons) and file.tensors[parts.projection].kind not in IN_PLACE
    return BakedFile(parts, parts.projection if parts.neurons else None, bias if bias in changed else None, quantised)


def _write(file: GgufFile, changed: Mapping[str, Tensor], record: Mapping[str, str], out: Path) -> None:
    """Write a copy of a file with some tensors changed or added, whole or not at all.

    Args:
        file: the file to copy.
        changed: tensors, float32 or as the file stores them.
        record: entries to add to the metadata.
        out: file to write.
    """
    if out.exists():
        raise ResultError(f"{out} exists; nothing is written over: give another")
    alignment = file.metadata.get("general.alignment", ALIGNMENT)
    with file.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        metadata, entries = _metadata(blob, file)
        placed = _place(file, changed, alignment)
        head = COUNTS.pack(MAGIC, struct.unpack_from("<I", blob, 4)[0], len(placed), entries + len(record)) + metadata
        for key, value in record.items():
            head += _string(key) + struct.pack("<I", STRING) + _string(value)
        head += _infos(placed)
        head += bytes(-len(head) % alignment)
        try:
            with temporary_sibling(out) as draft:
                with draft.open("wb") as target:
                    target.write(head)
                    for name, info in placed.items():
                        target.write(bytes(len(head) + info.offset - target.tell()))
                        for part in _contents(blob, file, name, changed):
                            target.write(part)
                    # llama.cpp pads the last tensor too.
                    target.write(bytes(-target.tell() % alignment))
                    target.flush()
                    os.fsync(target.fileno())
                draft.chmod(0o644)
                draft.replace(out)
            sync_folder(out.parent)
        except OSError as error:
            raise ResultError(f"cannot write {out}: {error.strerror or error}") from error


def _metadata(blob: mmap.mmap, file: GgufFile) -> tuple[bytes, int]:
    """Copy the metadata's bytes out of a file, and count its entries.

    It ends where the list of tensors begins, which is known to the byte.
    """
    first = min(info.offset for info in file.tensors.values())
    listed = _infos({name: info._replace(offset=info.offset - first) for name, info in file.tensors.items()})
    end = blob.rfind(listed, COUNTS.size, first)
    if end < 0:
        raise LoadError(f"{file.name}: the list of tensors is not where it should be. Convert the model again")
    return blob[COUNTS.size : end], COUNTS.unpack_from(blob)[3]


def _place(file: GgufFile, changed: Mapping[str, Tensor], alignment: int) -> dict[str, TensorInfo]:
    """Lay out the tensors in the file's order, as llama.cpp requires, new ones last. Offsets count from the first tensor."""
    kinds = {dtype: kind for kind, dtype in IN_PLACE.items()}
    placed, offset = dict[str, TensorInfo](), 0
    for name in (*file.tensors, *(name for name in changed if name not in file.tensors)):
        if name in changed:
            tensor = changed[name]
            placed[name], size = TensorInfo(tuple(tensor.shape), kinds[tensor.dtype], offset), tensor.nbytes
        else:
            placed[name], size = file.tensors[name]._replace(offset=offset), file.n_bytes(name)
        offset += math.ceil(size / alignment) * alignment
    return placed


def _contents(blob: mmap.mmap, file: GgufFile, name: str, changed: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Yield the bytes of a tensor, some at a time."""
    if name in changed:
        yield changed[name].contiguous().view(torch.uint8).numpy().tobytes()
        return
    start, size = file.tensors[name].offset, file.n_bytes(name)
    for part in range(start, start + size, COPIED_AT_ONCE):
        yield blob[part : min(part + COPIED_AT_ONCE, start + size)]


def _infos(tensors: Mapping[str, TensorInfo]) -> bytes:
    """Write names, shapes, types and offsets as a file lists them."""
    parts = []
    for name, (shape, kind, offset) in tensors.items():
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset))
    return b"".join(parts)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
