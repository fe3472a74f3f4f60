"""Weights of a GGUF file, with the names and shapes of transformers.

transformers can do this for more architectures, but takes a minute where this takes seconds. It reads the vocabulary once more,
and makes the table of names again for each module of the model.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from confsteer.model.gguf import GgufFile

NORM_OFFSET = dict.fromkeys(("gpt2", "llama", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"), 0.0) | dict.fromkeys(
    ("gemma2", "gemma3"), 1.0
)
"""Architecture of a GGUF file -> how much larger its norms' weights are than transformers'. Others are not read here."""


def state_dict(file: GgufFile, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read all weights that the model has a place for, dequantised, by their names in the model.

    Args:
        file: a file of an architecture in `NORM_OFFSET`.
        config: the config made from it.
        dtype: dtype of the weights.

    Raises:
        LoadError: see `GgufFile.tensor`.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = get_tensor_name_map(kind, config.num_hidden_layers)
    names = {own: table.get_name(own, try_suffixes=(".weight", ".bias")) for own, _ in model.named_parameters()}
    stored = {own: name for own, name in names.items() if name is not None and name in file.tensors}

    def read(own: str) -> Tensor:
        module = model.get_submodule(own.rpartition(".")[0])
        tensor = as_loaded(file.tensor(stored[own]), stored[own], module, file)
        if file.architecture == "llama" and ".attn_q." in stored[own]:
            tensor = _heads_in_halves(tensor, config.num_attention_heads)
        if file.architecture == "llama" and ".attn_k." in stored[own]:
            tensor = _heads_in_halves(tensor, config.num_key_value_heads)
        return tensor.to(dtype)

    # Use threads: numpy lets others work while it computes.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(stored, pool.map(read, stored), strict=True))


def as_loaded(tensor: Tensor, name: str, module: nn.Module, file: GgufFile) -> Tensor:
    """Give a tensor of a GGUF file the form it has in transformers, except for the work of `_heads_in_halves`.

    Args:
        tensor: the tensor as it is in the file.
        name: its name there.
        module: the module that it is a parameter of.
        file: the file, for its architecture.
    """
    if isinstance(module, Conv1D) and tensor.dim() == 2:
        return tensor.T.contiguous()
    return tensor - NORM_OFFSET[file.architecture] if name.endswith("norm.weight") else tensor


def _heads_in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Order the rows of each head as transformers rotates them: the first of all pairs, then the second.

    llama.cpp's converter alternates the two.
    """
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
