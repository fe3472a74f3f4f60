"""Tiny mixtures of experts of every family, and ones with planted neurons."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import confsteer
from confsteer.model.experts import MixtureAnatomy, down_proj_of
from confsteer.model.layers import read_norm
from confsteer.model.locate import locate
from confsteer.text.windows import make_windows
from tests.models import NULL_DIMS, VOCAB, TinyFamily, tiny_tokenizer, zipf_texts
from tests.planted import Planted

_BASE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "sliding_window": 32,
}
_GROUPS = {"n_group": 1, "topk_group": 1}
_LATENT = _GROUPS | {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 16}
_DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts": 4, "num_local_experts": 4}
MIXTURES = [
    TinyFamily("afmoe", _BASE | {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 8}),
    TinyFamily("deepseek_v2", _BASE | _LATENT | _DEEPSEEK | {"routed_scaling_factor": 1.5}),
    TinyFamily("deepseek_v3", _BASE | _LATENT | _DEEPSEEK),
    TinyFamily("dots1", _BASE | _GROUPS | _DEEPSEEK | {"first_k_dense_replace": 1, "head_dim": 8}),
    TinyFamily(
        "ernie4_5_moe",
        _BASE | {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_k": 2, "mlp_layer_types": ["sparse", "sparse"]},
    ),
    TinyFamily(
        "exaone_moe", _BASE | _GROUPS | {"num_experts": 4, "num_shared_experts": 1, "mlp_layer_types": ["sparse", "sparse"]}
    ),
    TinyFamily("flex_olmo", _BASE | {"num_experts": 4}),
    TinyFamily("glm4_moe", _BASE | _GROUPS | _DEEPSEEK | {"head_dim": 8, "first_k_dense_replace": 1}),
    TinyFamily("glm4_moe_lite", _BASE | _LATENT | _DEEPSEEK | {"mlp_layer_types": ["dense", "sparse"]}),
    TinyFamily("gpt_oss", _BASE | {"num_local_experts": 4, "head_dim": 8}),
    TinyFamily("granitemoe", _BASE | {"num_local_experts": 4, "residual_multiplier": 0.3, "logits_scaling": 4.0}),
    TinyFamily("granitemoeshared", _BASE | {"num_local_experts": 4, "shared_intermediate_size": 16}),
    TinyFamily("hunyuan_v1_moe", _BASE | {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    TinyFamily("hy_v3", _BASE | {"num_experts": 4, "num_shared_experts": 1, "head_dim": 8}),
    TinyFamily(
        "jamba",
        _BASE
        | {"num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2}
        | {"use_mamba_kernels": False},
    ),
    TinyFamily("laguna", _BASE | _SHARED | {"head_dim": 8}),
    TinyFamily("lfm2_moe", _BASE | {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    TinyFamily(
        "llama4_text",
        _BASE
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 24}
        | {"interleave_moe_layer_step": 1},
    ),
    TinyFamily("mellum", _BASE | {"num_experts": 4}),
    TinyFamily("mimo_v2_flash", _BASE | _GROUPS | {"n_routed_experts": 4, "head_dim": 8, "v_head_dim": 8}),
    TinyFamily("minimax", _BASE | {"num_local_experts": 4, "layer_types": ["full_attention", "full_attention"]}),
    TinyFamily("minimax_m2", _BASE | {"num_local_experts": 4, "head_dim": 8}),
    TinyFamily("mixtral", _BASE | {"num_local_experts": 4}),
    TinyFamily(
        "nemotron_h",
        _BASE
        | _GROUPS
        | {"n_routed_experts": 4, "hybrid_override_pattern": "M*E", "num_hidden_layers": 3}
        | {"moe_shared_expert_intermediate_size": 16}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "head_dim": 8, "n_groups": 2},
    ),
    TinyFamily("olmoe", _BASE | {"num_experts": 4}),
    TinyFamily("phimoe", _BASE | {"num_local_experts": 4}),
    TinyFamily("qwen2_moe", _BASE | _SHARED),
    TinyFamily("qwen3_5_moe_text", _BASE | _LINEAR | _SHARED | {"head_dim": 8}),
    TinyFamily("qwen3_moe", _BASE | {"num_experts": 4, "head_dim": 8}),
    TinyFamily("qwen3_next", _BASE | _LINEAR | _SHARED | {"head_dim": 8}),
    TinyFamily("solar_open", _BASE | _GROUPS | _DEEPSEEK | {"head_dim": 8}),
]
ROUTERS = ("gate", "router", "wg")
"""Names of the module that chooses experts, on the way to its weight."""
SEEDS = {"phimoe": 1, "flex_olmo": 1}
"""Models by chance without another neuron that is one."""
CONFIGS = {family.model_type: family.config for family in MIXTURES}


WIDE = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_attention_heads": 2,
    "head_dim": 32,
}
"""The least that vLLM has kernels for."""


def tiny_mixture(model_type: str, *, seed: int = 0, **config: Any) -> Any:
    """A randomly initialised mixture of four experts, which are chosen and write as much as they would after training."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = special | CONFIGS[model_type] | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=VOCAB, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in name or "lm_head" in name or name.split(".")[-2] in ROUTERS:
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 3 or name.endswith("_bias"):
                parameter.copy_(0.1 * noise)
    return model.eval()


ROUTED_ENTROPY, SHARED_ENTROPY, FREQUENCY = (1, 5), 7, (2, 3)
"""Planted neurons, as expert and number: one that raises the entropy, one of the shared expert that lowers it (where there is
none, of expert 3), and one that lowers frequent tokens."""


def planted_mixture(model_type: str, counts: torch.Tensor, **config: Any) -> Any:
    """A tiny mixture of experts with the null space and the neurons of `planted_model`, in three experts."""
    model = tiny_mixture(model_type, seed=SEEDS.get(model_type, 0), **config)
    anatomy = locate(model)
    assert isinstance(anatomy, MixtureAnatomy)
    norm = read_norm(anatomy.final_norm, anatomy.d_model)
    with torch.no_grad():
        for module in filter(None, (anatomy.final_norm, anatomy.write_norm)):
            module.get_parameter("weight").sub_(read_norm(module, anatomy.d_model).gain - 1)
        down = down_proj_of(anatomy.down_proj)
        shared = down[3] if anatomy.shared is None else anatomy.shared.get_parameter("weight").T
        unembedding = anatomy.unembedding.get_parameter("weight")
        # Nothing is read from the null space, and nothing but the entropy neurons writes into it.
        unembedding[:, -NULL_DIMS:] = 0
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj") and parameter.dim() == 3:
                into = parameter if parameter.shape[2] == anatomy.d_model else parameter.transpose(1, 2)
                into[..., -NULL_DIMS:] = 0
            elif name.split(".")[-2] in ROUTERS and parameter.dim() == 2:
                parameter[:, -NULL_DIMS:] = 0  # the constant there would choose the experts
            elif name.endswith("down_proj_bias"):
                parameter[:, -NULL_DIMS:] = 0
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == anatomy.d_model:
                module.weight[-NULL_DIMS:] = 0
                if module.bias is not None:
                    module.bias[-NULL_DIMS:] = 0
        # The planted neurons are far more active than the others.
        experts: Any = anatomy.down_proj
        first = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
        first = first.transpose(1, 2) if first.shape[2] != anatomy.d_model else first  # [experts, units of both, d_model]
        pairs = first.shape[1] // down.shape[1]
        for expert, unit in (ROUTED_ENTROPY, FREQUENCY, (3, SHARED_ENTROPY)):
            interleaved = not getattr(experts, "is_concatenated", True)
            rows = [pairs * unit + i if interleaved else unit + i * down.shape[1] for i in range(pairs)]
            first[expert, rows] = 0.3 * torch.randn(pairs, anatomy.d_model)
            first[expert, rows, -NULL_DIMS:] = 0
        for name, linear in [] if anatomy.shared_mlp is None else anatomy.shared_mlp.named_modules():
            if name in ("gate_proj", "up_proj", "input_linear"):
                linear.weight[SHARED_ENTROPY :: len(shared)] = 0.3 * torch.randn(1, anatomy.d_model)
                linear.weight[:, -NULL_DIMS:] = 0
        constant = torch.tensor([1.0, -1.0, 1.0, -1.0])
        model.get_input_embeddings().weight[:, -NULL_DIMS:] = 2 * constant
        for row, sign in ((down[ROUTED_ENTROPY], 1), (shared[SHARED_ENTROPY], -1)):
            row[:] = 0
            row[-NULL_DIMS:] = 4 * sign * constant
        log_frequency = ((counts + 1) / (counts + 1).sum()).log()
        unembedding[:, 0] = 0.3 * (log_frequency - log_frequency.mean())
        row = down[FREQUENCY]
        row[:] = 0
        row[0] = -2.0
        if norm.centred:
            row[-NULL_DIMS:] = -row[0] / NULL_DIMS
    return model


@functools.cache
def planted_experts(model_type: str, *, wide: bool = False, **config: Any) -> Planted:
    """Tests must leave the model as they found it."""
    texts, tokenizer = zipf_texts(20, 200), tiny_tokenizer()
    counts = make_windows(texts, tokenizer, window=64).counts(VOCAB)
    sizes = {name: size for name, size in WIDE.items() if wide and name in CONFIGS[model_type]}
    model = planted_mixture(model_type, counts, **sizes | config)
    few = texts[:3]
    profile = confsteer.calibrate(model, tokenizer, few, window=64, unigram_counts=counts.numpy(), source="zipf")
    return Planted(model, tokenizer, few, profile)
