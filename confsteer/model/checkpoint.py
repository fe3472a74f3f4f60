"""The last layer of a model on disk: its few tensors, read without the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from confsteer.errors import ConfsteerError, LoadError, UnsupportedModelError
from confsteer.model import gguf
from confsteer.model.anatomy import Anatomy
from confsteer.model.experts import MixtureAnatomy
from confsteer.model.experts_on_disk import stored_experts, with_stored
from confsteer.model.gguf import GgufFile
from confsteer.model.gguf_weights import NORM_OFFSET, as_loaded
from confsteer.model.layers import dtype_name
from confsteer.model.loading import auto_class, gguf_config, reason, why_not
from confsteer.model.locate import locate

READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Places = dict[str, tuple[nn.Module, str]]
"""Name of a tensor in the checkpoint -> its module and the weight's name there."""


class LastLayer(NamedTuple):
    """The end of a model on disk."""

    config: Any
    commit: str | None
    """Commit on the hub, if it is from there."""
    anatomy: Anatomy
    """Last layer of a model that has no other weights than those read."""
    tensors: dict[str, Tensor]
    """Tensors that were read, by the names in the checkpoint."""
    bytes_read: int
    """Size of these tensors in the checkpoint."""
    bytes_total: int | None
    """Size of the whole checkpoint; None if its index does not say."""
    file: GgufFile | None = None
    """The GGUF file that it was read from, if any."""
    streamed: tuple[str, ...] = ()
    """Names of a mixture's tensors that are read one expert at a time, when their neurons are needed."""


def read_last_layer(
    source: str, *, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> LastLayer:
    """Read a checkpoint's unembedding, final norm and last MLP's output projection, and nothing else of it.

    Raises:
        LoadError: as `scan`.
        UnsupportedModelError: see `confsteer.model.locate`.
    """
    file = gguf.find(source, gguf_file, revision)
    if file is not None:
        return _read_gguf(file)
    try:
        # Pin the commit, so that all files are of one, even if the branch moves meanwhile.
        commit = extract_commit_hash(str(_file(source, CONFIG_NAME, revision)), None)
        revision = commit or revision
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds
        raise LoadError(f"cannot load {source}: {why_not(error, source, revision)}") from error
    model, anatomy = _skeleton(config, trust_remote_code)
    shard_of, bytes_total = _shards(source, revision)
    places = _places(model, anatomy, source, shard_of)
    tensors: dict[str, Tensor] = {}
    for shard in sorted({shard_of[name] for name in places}):
        try:
            path = _file(source, shard, revision)
        except OSError as error:
            raise LoadError(f"cannot read {shard} of {source}: {reason(error)}") from error
        with _opened(path) as opened:
            tensors |= {name: opened.get_tensor(name) for name in places if shard_of[name] == shard}
    _fill(places, tensors, source)
    anatomy = locate(model)  # with factors that are among the weights
    bytes_read = sum(tensor.nbytes for tensor in tensors.values())
    if not isinstance(anatomy, MixtureAnatomy):
        return LastLayer(config, commit, anatomy, tensors, bytes_read, bytes_total)
    experts = stored_experts(model, anatomy, source, shard_of, lambda shard: _file(source, shard, revision))
    anatomy, bytes_read = with_stored(anatomy, experts), bytes_read + experts.n_bytes
    return LastLayer(config, commit, anatomy, tensors, bytes_read, bytes_total, streamed=tuple(experts.names))


def _read_gguf(file: GgufFile) -> LastLayer:
    if file.architecture not in NORM_OFFSET:
        raise LoadError(
            f"{file.name} is of the architecture {file.architecture}, whose last layer is not read without the rest (it is of "
            f"{', '.join(sorted(NORM_OFFSET))}): run confsteer calibrate, which loads the model"
        )
    config = gguf_config(file)
    _, anatomy = _skeleton(config, trust_remote_code=False)
    anatomy.require_dense("a scan of a GGUF file")
    places = _gguf_places(anatomy, file)
    tensors = {name: as_loaded(file.tensor(name), name, module, file) for name, (module, _) in places.items()}
    _fill(places, tensors, file.name)
    bytes_read = sum(file.n_bytes(name) for name in tensors)
    return LastLayer(config, file.commit, anatomy, tensors, bytes_read, file.path.stat().st_size, file)


def _gguf_places(anatomy: Anatomy, file: GgufFile) -> Places:
    """Find where the tensors at the end of a GGUF file go."""
    block = f"blk.{anatomy.layer}"
    # Take the embedding for an unembedding that is not there: they are tied.
    unembedding = "output" if "output.weight" in file.tensors else "token_embd"
    names = {anatomy.down_proj: f"{block}.ffn_down", anatomy.final_norm: "output_norm", anatomy.unembedding: unembedding}
    if anatomy.write_norm is not None:
        names[anatomy.write_norm] = f"{block}.post_ffw_norm"
    places = {f"{names[module]}.{parameter}": (module, parameter) for module, parameter in _needed(anatomy)}
    if missing := [name for name in places if name not in file.tensors]:
        raise LoadError(f"{file.name} has no tensor {missing[0]}: it is incomplete")
    return places


def _skeleton(config: Any, trust_remote_code: bool) -> tuple[PreTrainedModel, Anatomy]:
    """Lay out a model without weights, and find its last layer."""
    try:
        with torch.device("meta"):
            # Use eager attention: the other kinds read the values of the mask, and the meta device has none. Use bfloat16: the
            # meta device has grouped products of experts in no other. The weights that are read keep their stored precision.
            how: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.bfloat16}
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **how)
        return model, locate(model)
    except ConfsteerError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UnsupportedModelError(
            f"{config.model_type} cannot be laid out as a causal language model without its weights: {reason(error)}. If "
            "it is one, run confsteer calibrate, which loads them"
        ) from error


def _shards(source: str, revision: str | None) -> tuple[dict[str, str], int | None]:
    """Find the file of each tensor of a checkpoint, and the size of all of them in bytes if it is known."""
    try:
        try:
            single = _file(source, SAFE_WEIGHTS_NAME, revision)
        except OSError:
            index = json.loads(_file(source, SAFE_WEIGHTS_INDEX_NAME, revision).read_bytes())
            return dict(index["weight_map"]), index.get("metadata", {}).get("total_size")
    except OSError as error:
        raise LoadError(
            f"{source} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME} within reach. Checkpoints of other formats "
            "are not read, because to unpickle one is to run its code: load and save it with transformers to convert it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{SAFE_WEIGHTS_INDEX_NAME} of {source} is not an index of safetensors files") from error
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME), single.stat().st_size


def _needed(anatomy: Anatomy) -> list[tuple[nn.Module, str]]:
    """List the modules at the end of a model, with the parameters that decide what a neuron writes."""
    needed = [(layer, "weight") for layer in anatomy.linear_projections]  # their biases are no neuron's write
    for module in filter(None, (anatomy.write_norm, anatomy.final_norm, anatomy.unembedding)):
        needed += [(module, parameter) for parameter, _ in module.named_parameters(recurse=False)]
    if hasattr(anatomy.last_layer, "layer_scalar"):
        needed.append((anatomy.last_layer, "layer_scalar"))
    return needed


def _places(model: PreTrainedModel, anatomy: Anatomy, source: str, shard_of: dict[str, str]) -> Places:
    """Find where the tensors at the end of a checkpoint of safetensors go."""
    stored = _stored_names(model, shard_of)
    path_of = {module: path for path, module in model.named_modules()}
    places = {}
    for module, parameter in _needed(anatomy):
        own = f"{path_of[module]}.{parameter}"
        value = getattr(module, parameter)
        # Try its own name first, as transformers does: a tied parameter is stored under any of its names.
        names = [own, *(path for path, p in model.named_parameters(remove_duplicate=False) if p is value)]
        found = next((stored[name] for name in names if name in stored), None)
        if found is None:
            raise LoadError(f"the checkpoint of {source} has no tensor for {own}: it is incomplete, or quantised")
        places[found] = module, parameter
    return places


def _fill(places: Places, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give the modules at the end of a model their weights."""
    for name, (module, parameter) in places.items():
        tensor, shape = tensors[name], getattr(module, parameter).shape
        if tensor.dtype not in READABLE_DTYPES or tensor.shape != shape:
            raise LoadError(
                f"{name} of {source} is {dtype_name(tensor.dtype)} {list(tensor.shape)}; it should be {list(shape)} in float32, "
                "bfloat16 or float16. If the checkpoint is quantised, scan the one it was made from"
            )
        if not tensor.isfinite().all():
            raise LoadError(f"{name} of {source} has numbers that are not finite: the checkpoint is damaged")
        trained = isinstance(getattr(module, parameter), nn.Parameter)
        setattr(module, parameter, nn.Parameter(tensor, requires_grad=False) if trained else tensor)


def _stored_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Map names in the model to names in the checkpoint, by the renamings that transformers makes when it loads one."""
    parameters = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stored = {}
    for name in names:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if converter is None:  # else it is not stored as the model has it
            stored[renamed] = name
    return stored


def _file(source: str, name: str, revision: str | None) -> Path:
    """Find a file in a local folder, in the hub's cache, or on the hub.

    Raises:
        OSError: it is in none of these.
    """
    path = cached_file(source, name, revision=revision)
    if path is None:
        raise FileNotFoundError(f"it has no {name}")
    return Path(path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file, mapped into memory: only what is used is read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is not a whole safetensors file: {error}") from error
