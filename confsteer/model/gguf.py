"""GGUF files: their metadata, single tensors, and the settings that transformers does not read from them.

The header is read here. The reader of the package ``gguf`` makes an object for every token of the vocabulary, which takes far
longer than reading the tensors. Because transformers uses that reader, it is given a file without the vocabulary to make the
config from. The package dequantises blocks.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
import struct
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.hub import cached_file, extract_commit_hash

from confsteer.errors import LoadError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
SPLIT_NAME = re.compile(r"-\d{5}-of-\d{5}$")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value in the metadata -> its format in ``struct``."""
UINT32, STRING, ARRAY = 4, 8, 9
FLOAT32 = 0
"""ggml's number for a tensor in float32, whose numbers are not in blocks."""
ALIGNMENT = 32
"""Alignment of tensors, in bytes, if the file says nothing."""
MAX_DIMS = 4
WEIGHTS_AT_ONCE = 1 << 19
"""Weights dequantised at a time: enough for numpy to be fast, and few enough for a cache."""
EMBEDDING = "token_embd.weight"
SIZED_BY_TOKENS = ("gpt2", "starcoder2")
"""Architectures whose vocabulary size transformers finds only by counting the tokens."""
BYTE_LEVEL_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Pre-tokenizers of byte-level vocabularies for which llama.cpp starts texts with BOS if the file says nothing."""
CUT_AS_GPT2 = ("default", "gpt-2", "smollm", "starcoder", "refact", "command-r", "olmo", "mpt")
"""Pre-tokenizers that split text as GPT-2's does, or that split more, but where no merge crosses the additional splits."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of all Llama 3.1 to 3.3. A file holds the factors computed from them, not these."""
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Number of layers of those Gemmas that do not scale attention by the size of a head. The file does not say so."""


class TensorInfo(NamedTuple):
    """Place and type of a tensor in a file."""

    shape: tuple[int, ...]
    """Sizes, rows first as in torch."""
    kind: int
    """Number of its ggml type."""
    offset: int
    """Bytes from the start of the file."""


class GgufFile(NamedTuple):
    """A GGUF file on this machine, with what its header says."""

    name: str
    """Path as the user gave it, or hub id and file."""
    path: Path
    commit: str | None
    """Commit on the hub, if it is from there."""
    metadata: dict[str, Any]
    """Entries of the metadata that are not arrays."""
    tensors: dict[str, TensorInfo]
    settings: tuple[bytes, ...]
    """Entries of the metadata as bytes of the file, without the arrays of the tokenizer."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def setting(self, key: str) -> Any:
        """Look up a setting under the architecture's name; None if the file does not have it."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, dequantised to float32.

        Raises:
            LoadError: the installed ``gguf`` does not know its type.
        """
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        shape, kind, offset = self.tensors[name]
        raw = np.memmap(self.path, np.uint8, "r", offset=offset, shape=self.n_bytes(name))
        in_block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        blocks, step = raw.reshape(-1, size), WEIGHTS_AT_ONCE // in_block
        values = np.empty((len(blocks), in_block), np.float32)
        try:
            for first in range(0, len(blocks), step):
                some = slice(first, first + step)
                # Give it one row: the package takes sixteen rows at a time, and in a small model these are few blocks.
                row = np.ascontiguousarray(blocks[some]).reshape(1, -1)
                values[some] = dequantize(row, GGMLQuantizationType(kind)).reshape(-1, in_block)
        except (NotImplementedError, KeyError) as error:
            raise LoadError(f"{name} of {self.name} is of a type that cannot be dequantised: {error}") from error
        return torch.from_numpy(values).reshape(shape)

    def check(self) -> None:
        """
        Raises:
            LoadError: a tensor's type is unknown here, or the file ends before the tensors do.
        """
        ends = [info.offset + self.n_bytes(name) for name, info in self.tensors.items()]
        size = self.path.stat().st_size
        if size < max(ends, default=0):
            raise LoadError(f"{self.name} is truncated: it has {size:,} of {max(ends):,} bytes. Download it again")

    def n_bytes(self, name: str) -> int:
        """Compute the bytes that a tensor takes in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        shape, kind, _ = self.tensors[name]
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise LoadError(
                f"{name} of {self.name} is of type {kind}, which the installed gguf does not know: pip install -U gguf"
            ) from error
        if shape[-1] % block:
            raise LoadError(f"{self.name} is damaged: rows of {name} are not whole blocks")
        return math.prod(shape) // block * size


def find(source: str, gguf_file: str | None, revision: str | None) -> GgufFile | None:
    """Find the GGUF file that a user means, and read its header.

    Args:
        source: path of a file; or a folder or hub id, if `gguf_file` is given.
        gguf_file: name of a file in the folder or the hub's repository.
        revision: branch, tag or commit on the hub.

    Returns:
        None if the user means a checkpoint of another kind.

    Raises:
        LoadError: there is no such file, it is not a whole GGUF file, or ``gguf`` is not installed.
    """
    is_path = source.lower().endswith(SUFFIX) and not Path(source).is_dir()
    if gguf_file is None and not is_path:
        return None
    if gguf_file is not None and is_path:
        raise LoadError(f"{source} is a GGUF file itself: {gguf_file} can only be one of a folder or a hub repository")
    name = source if gguf_file is None else f"{source.rstrip('/')}/{gguf_file}"
    if gguf_file is None:
        path = Path(source)
        if not path.is_file():
            raise LoadError(f"there is no file {source}. For a file of a hub repository give OWNER/REPO --gguf FILE")
    else:
        try:
            path = Path(str(cached_file(source, gguf_file, revision=revision)))
        except Exception as error:  # transformers and the hub raise many kinds
            raise LoadError(f"cannot find {gguf_file} in {source}: {' '.join(str(error).split())[:300]}") from error
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise LoadError("this needs gguf: pip install 'confsteer[gguf]'") from error
    metadata, tensors, settings = read_header(path, name)
    if SPLIT_NAME.search(path.stem) or metadata.get("split.count", 1) > 1:
        raise LoadError(f"{name} is one part of a split model: join the parts with llama.cpp's llama-gguf-split --merge")
    file = GgufFile(name, path, extract_commit_hash(str(path), None), metadata, tensors, settings)
    file.check()
    return file


def hint(source: str) -> str:
    """Say how to ask for a file of a repository, if `source` looks like a repository of GGUF files."""
    return ". To load one of its GGUF files, name it with --gguf FILE (gguf_file in Python)" if "gguf" in source.lower() else ""


def read_header(path: Path, name: str) -> tuple[dict[str, Any], dict[str, TensorInfo], tuple[bytes, ...]]:
    """Read a file's metadata, the places of its tensors, and its settings, as `GgufFile` holds them.

    Raises:
        LoadError: it is not a GGUF file, its version is unknown here, or it is damaged.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise LoadError(f"{name} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                return _Header(blob).read(name)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise LoadError(f"{name} is truncated or damaged: its header does not make sense. Download it again") from error
    except OSError as error:
        raise LoadError(f"cannot read {name}: {error.strerror or error}") from error


class _Header:
    """Header of a file in memory, and how far it was read."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob, self.position = blob, len(MAGIC)

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, TensorInfo], tuple[bytes, ...]]:
        version, n_tensors, n_values = self._next("IQQ")
        if version not in VERSIONS:
            raise LoadError(f"{name} is GGUF of version {version}; {' and '.join(map(str, VERSIONS))} can be read")
        metadata, settings = {}, []
        for _ in range(n_values):
            start = self.position
            key = self._string()
            value = self._value(*self._next("I"))
            if value is not None:
                metadata[key] = value
            if value is not None or not key.startswith("tokenizer."):
                settings.append(self.blob[start : self.position])
        found = {}
        for _ in range(n_tensors):
            tensor, (n_dims,) = self._string(), self._next("I")
            if not 0 < n_dims <= MAX_DIMS:
                raise struct.error("dimensions")
            # Reverse them: the fastest dimension comes first in the file.
            shape = self._next(f"{n_dims}Q")[::-1]
            if 0 in shape:
                raise struct.error("no elements")
            found[tensor] = TensorInfo(shape, *self._next("IQ"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or not isinstance(metadata.get("general.architecture"), str):
            raise struct.error("metadata")
        start = -(-self.position // alignment) * alignment
        placed = {tensor: info._replace(offset=start + info.offset) for tensor, info in found.items()}
        return metadata, placed, tuple(settings)

    def _next(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.blob, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def _string(self) -> str:
        (length,) = self._next("Q")
        return bytes(self._next(f"{min(length, len(self.blob))}s")[0]).decode("utf-8")

    def _value(self, kind: int) -> Any:
        """Read a value. An array is skipped, and gives None."""
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._next(SCALARS[kind])[0]
        if kind != ARRAY:
            raise struct.error("type")
        element, count = self._next("IQ")
        if element == STRING:
            for _ in range(count):
                (length,) = self._next("Q")
                self.position += length
        elif element in SCALARS:
            self.position += count * struct.calcsize(f"<{SCALARS[element]}")
        else:
            raise struct.error("type")
        return None


@contextlib.contextmanager
def alone(file: GgufFile, *, settings: bool = False) -> Iterator[dict[str, str]]:
    """Give arguments for ``from_pretrained`` that read this file, and nothing else in its folder or the current one.

    Otherwise transformers prefers a tokenizer beside the file, and a file of that name in the current folder.

    Args:
        file: the file to read.
        settings: whether only the config is read.
    """
    with tempfile.TemporaryDirectory(prefix="confsteer-gguf-") as folder:
        place = Path(folder) / file.path.name
        if settings and EMBEDDING in file.tensors and file.architecture not in SIZED_BY_TOKENS:
            place.write_bytes(_settings_alone(file))
        else:
            place.symlink_to(file.path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": str(place)}


def _settings_alone(file: GgufFile) -> bytes:
    """Make a GGUF file with the same settings and tensor names, but without vocabulary and with a single 0 in each tensor."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    settings = [*file.settings]
    if file.setting("vocab_size") is None:
        # Write the size of the vocabulary: transformers would count the tokens.
        rows = file.tensors[EMBEDDING].shape[0]
        settings.append(string(f"{file.architecture}.vocab_size") + struct.pack("<II", UINT32, rows))
    head = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(file.tensors), len(settings)) + b"".join(settings)
    head += b"".join(string(name) + struct.pack("<IQIQ", 1, 1, FLOAT32, 0) for name in file.tensors)
    return head + bytes(-len(head) % file.metadata.get("general.alignment", ALIGNMENT) + 4)


def complete_config(config: Any, file: GgufFile) -> None:
    """Put into a config the settings of the file that transformers does not read.

    Raises:
        LoadError: the file asks for something that transformers would not compute.
    """
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if file.setting(key) is not None and hasattr(config, key):
            setattr(config, key, file.setting(key))
    if "position_embd.weight" in file.tensors:
        config.max_position_embeddings = file.tensors["position_embd.weight"].shape[0]
    if file.architecture == "phi3" and file.setting("attention.sliding_window"):
        config.sliding_window = file.setting("attention.sliding_window")
    if hasattr(config, "query_pre_attn_scalar"):
        largest = config.num_hidden_layers == GEMMA_27B_LAYERS.get(file.architecture)
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    _scale_rotation(config, file)
    rope = _rope(config)
    # Take the size that the file gives for full attention: Gemma 4 has larger heads there.
    own_head = getattr(config, "global_head_dim", None) or getattr(config, "head_dim", None)
    head = own_head or config.hidden_size // config.num_attention_heads
    epsilons = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
    epsilon = next((getattr(config, name) for name in epsilons if hasattr(config, name)), None)
    read = {
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)) if rope else None,
        "attention.key_length": own_head,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.layer_norm_epsilon": epsilon,
    }
    for key, value in read.items():
        said = file.setting(key)
        if said is not None and value is not None and not math.isclose(said, value, rel_tol=1e-5):
            raise LoadError(
                f"{file.name} says {file.architecture}.{key} = {said:g}, and transformers reads {value:g}: it would compute "
                "something else. Give the checkpoint that the file was made from"
            )


def _rope(config: Any) -> dict[str, Any]:
    """Find the rotation's parameters: those of full attention, if a model has several kinds."""
    parameters = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = parameters.get("full_attention", parameters)
    return found


def _scale_rotation(config: Any, file: GgufFile) -> None:
    """Put the file's scaling of the rotation into a config: transformers does not read it."""
    refusal = "which confsteer does not load from a GGUF file. Give the checkpoint that the file was made from"
    if unread := [name for name in file.tensors if name.startswith("rope_factors")]:
        raise LoadError(f"{file.name} scales its rotation by {unread[0]}, {refusal}")
    rope = _rope(config)
    factor = file.setting("rope.scaling.factor") or file.setting("rope.scale_linear") or 1.0
    kind = file.setting("rope.scaling.type") or "linear"
    if kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise LoadError(f"{file.name} scales its rotation by {kind}, {refusal}")
    if "rope_freqs.weight" not in file.tensors:
        return
    factors = file.tensor("rope_freqs.weight")
    if (factors == 1).all():
        return
    base = rope["rope_theta"] ** (-torch.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    rope |= {"rope_type": "llama3", "factor": round(float(factors.max()), 3)} | LLAMA3_ROPE
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if frequencies.shape != base.shape or not torch.allclose(frequencies, base / factors, rtol=1e-4, atol=0):
        raise LoadError(f"{file.name} scales its rotation by rope_freqs.weight otherwise than Llama 3, {refusal}")


def check_all_used(model: nn.Module, config: Any, file: GgufFile) -> None:
    """Raise LoadError if the file has weights without a place in the model, which would then compute without them."""
    beyond = tuple(f"blk.{layer}." for layer in range(config.num_hidden_layers, int(file.setting("block_count") or 0)))
    of_the_model = [i for name, i in file.tensors.items() if name != "rope_freqs.weight" and not name.startswith(beyond)]
    held, needed = sum(math.prod(info.shape) for info in of_the_model), sum(p.numel() for p in model.parameters())
    if held != needed:
        raise LoadError(
            f"{file.name} holds {held:,} weights, and the {config.model_type} that transformers makes of it {needed:,}: it "
            "would compute something else. Give the checkpoint that the file was made from"
        )


def obey(tokenizer: PreTrainedTokenizerBase, file: GgufFile) -> None:
    """Make the tokenizer start and end texts as the file says, or else as llama.cpp does. transformers adds neither."""
    says = file.metadata.get
    pieces, pre = says("tokenizer.ggml.model") == "llama", says("tokenizer.ggml.pre")
    starts = says("tokenizer.ggml.add_bos_token", pieces or pre in BYTE_LEVEL_WITH_BOS)
    chosen: Any = tokenizer
    chosen.add_bos_token = bool(starts) and tokenizer.bos_token_id is not None
    chosen.add_eos_token = bool(says("tokenizer.ggml.add_eos_token")) and tokenizer.eos_token_id is not None
    tokenizer.name_or_path = file.name
    disobeyed = None
    prefix, words = says("tokenizer.ggml.add_space_prefix"), tokenizer.tokenize("a")
    if pieces and prefix is not None and words and words[0].startswith("▁") != prefix:
        disobeyed = f"add_space_prefix = {str(prefix).lower()}"
    if says("tokenizer.ggml.model") == "gpt2" and pre is not None and pre not in (*CUT_AS_GPT2, *_splits_known()):
        disobeyed = f"pre = {pre}"
    if disobeyed:
        warnings.warn(
            f"{file.name} says {disobeyed}, which the tokenizer that transformers makes of it does not obey: text may become "
            "other tokens than the model was trained on",
            stacklevel=3,
        )


def _splits_known() -> Iterable[str]:
    """Ask transformers which pre-tokenizers it has. The answer is empty if it no longer says."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return ()
    return GGUF_PRE_TOKENIZER_SPLITS.keys()


def ends_of_text(file: GgufFile) -> list[int]:
    """Find the ids that end a generation: EOS, and the end of a turn if the file has one."""
    ids = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(i for i in ids if i is not None))
