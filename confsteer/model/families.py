"""Where each family of models keeps the modules at its end."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Module paths in a `PreTrainedModel`; `down_proj` and `write_norm` are inside each layer."""

    layers: str
    down_proj: str
    final_norm: str
    write_norm: str | None = None
    """A norm on the MLP's output, before it is added to the residual."""


_LLAMA_LIKE = Family("model.layers", "mlp.down_proj", "model.norm")
_GEMMA2_LIKE = _LLAMA_LIKE._replace(write_norm="post_feedforward_layernorm")
FAMILIES: dict[str, Family] = {
    "cohere": _LLAMA_LIKE,
    "exaone4": _GEMMA2_LIKE,
    "falcon": Family("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "gemma": _LLAMA_LIKE,
    "gemma2": _GEMMA2_LIKE,
    "gemma3_text": _GEMMA2_LIKE,
    "glm4": _LLAMA_LIKE._replace(write_norm="post_mlp_layernorm"),
    "gpt2": Family("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neo": Family("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    "gptj": Family("transformer.h", "mlp.fc_out", "transformer.ln_f"),
    "granite": _LLAMA_LIKE,
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _GEMMA2_LIKE,
    "olmo3": _GEMMA2_LIKE,
    "opt": Family("model.decoder.layers", "fc2", "model.decoder.final_layer_norm"),
    "phi": Family("model.layers", "mlp.fc2", "model.final_layernorm"),
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "starcoder2": Family("model.layers", "mlp.c_proj", "model.norm"),
}
"""Model type of the config -> where things are. Adding a family is one row here and one in ``tests/models.py``."""
