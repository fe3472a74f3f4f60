"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models import VOCAB

CHAT = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
BYTE_LEVEL = ["<eos>", *map(chr, range(33, 126)), "ab", "Ġ"]
"""A vocabulary of single letters, and one pair; id 0 is BOS and EOS."""
PIECES = ["<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 125))]
"""A vocabulary as sentencepiece's; id 1 is BOS."""
ARCHITECTURES = {"gemma3_text": "gemma3"}
"""Name in GGUF of a model type, where it differs."""


def metadata(model: Any, *, pieces: bool = False) -> dict[str, Any]:
    """Collect what a converter says of a tiny model and its vocabulary."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    epsilon = next(value for name, value in config.to_dict().items() if name.endswith(("eps", "epsilon")))
    rms = "layer_norm" if arch in ("gpt2", "stablelm", "starcoder2") else "layer_norm_rms"
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * config.hidden_size),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", heads),
        f"attention.{rms}_epsilon": epsilon,
    }
    if rope:
        own |= {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": int(size * rope.get("partial_rotary_factor", 1))}
    if hasattr(config, "head_dim"):
        own |= {"attention.key_length": size, "attention.value_length": size}
    if getattr(config, "sliding_window", None):
        own |= {"attention.sliding_window": config.sliding_window}
    if arch == "gemma2":
        own |= {"final_logit_softcapping": config.final_logit_softcapping}
    tokens = PIECES if pieces else BYTE_LEVEL
    words: dict[str, Any] = (
        {"model": "llama", "scores": [float(-i) for i in range(VOCAB)]} if pieces else {"model": "gpt2", "merges": ["a b"]}
    )
    words |= {"tokens": tokens, "token_type": [3 if token.startswith("<") and token.endswith(">") else 1 for token in tokens]}
    words |= {"bos_token_id": 1 if pieces else 0, "eos_token_id": 0}
    return (
        {"general.architecture": arch, "general.name": "tiny", "tokenizer.chat_template": CHAT}
        | {f"{arch}.{key}": value for key, value in own.items()}
        | {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    )


def write(path: Path, model: Any, *, kind: str = "F32", pieces: bool = False, says: Any = None, more: Any = None) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: of the file.
        model: a tiny one.
        kind: how its matrices are stored.
        pieces: whether the vocabulary is `PIECES`.
        says: metadata beyond `metadata`; None takes a key away.
        more: tensors beyond the model's, by their names in the file; None takes one away.
    """
    import gguf

    values = {key: value for key, value in (metadata(model, pieces=pieces) | (says or {})).items() if value is not None}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for key, value in values.items():
        add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in {name: t for name, t in (named(model) | (more or {})).items() if t is not None}.items():
        # Matrices are quantised row by row, and what is small is not.
        if kind != "F32" and tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            as_kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), as_kind), raw_dtype=as_kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(model: Any) -> dict[str, Tensor]:
    """Give a model's tensors their names in GGUF and the form they have there."""
    import gguf

    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for own, parameter in model.named_parameters():
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        assert name, own
        tensor = parameter.detach().clone()
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            # The two halves of a head take turns there.
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch == "gpt2" and tensor.dim() == 2 and ".h." in own:
            tensor = tensor.T
        found[name] = tensor.contiguous()
    return found


def quantised(tensor: Tensor, kind: str) -> Tensor:
    """Quantise a matrix and take what is left of it."""
    import gguf

    as_kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), as_kind), as_kind))
