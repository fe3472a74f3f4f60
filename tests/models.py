"""Tiny models for tests: random ones of every family, and ones with planted neurons."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from confsteer.model.anatomy import Anatomy
from confsteer.model.layers import read_norm
from confsteer.model.loading import auto_class
from confsteer.model.locate import locate

VOCAB = 96


class TinyFamily(NamedTuple):
    model_type: str
    config: dict[str, Any]


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES = [
    TinyFamily("cohere", _LLAMA | {"logit_scale": 0.25}),
    TinyFamily("exaone4", _LLAMA),
    TinyFamily("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}),
    TinyFamily("gemma", _LLAMA | {"head_dim": 8}),
    TinyFamily("gemma2", _LLAMA | {"head_dim": 8, "final_logit_softcapping": 8.0, "sliding_window": 32}),
    TinyFamily("gemma3_text", _LLAMA | {"head_dim": 8, "sliding_window": 32}),
    TinyFamily(
        "gemma4_text", _LLAMA | {"head_dim": 8, "sliding_window": 32, "hidden_size_per_layer_input": 0, "global_head_dim": 8}
    ),
    TinyFamily("glm4", _LLAMA | {"head_dim": 8, "pad_token_id": 0}),
    TinyFamily("gpt2", _GPT2),
    TinyFamily(
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "max_position_embeddings": 64},
    ),
    TinyFamily("gpt_neox", _LLAMA),
    TinyFamily("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    TinyFamily("granite", _LLAMA | {"logits_scaling": 4.0, "residual_multiplier": 0.3, "embedding_multiplier": 2.0}),
    TinyFamily("llama", _LLAMA),
    TinyFamily("mistral", _LLAMA),
    TinyFamily("olmo", _LLAMA),
    TinyFamily("olmo2", _LLAMA),
    TinyFamily("olmo3", _LLAMA | {"sliding_window": 32}),
    TinyFamily(
        "opt",
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64},
    ),
    TinyFamily("phi", _LLAMA),
    TinyFamily("phi3", _LLAMA | {"pad_token_id": 0}),
    TinyFamily("qwen2", _LLAMA),
    TinyFamily("qwen3", _LLAMA | {"head_dim": 8}),
    TinyFamily("smollm3", _LLAMA | {"pad_token_id": 0}),
    TinyFamily("stablelm", _LLAMA),
    TinyFamily("starcoder2", _LLAMA),
]

IMAGE, IMAGE_TOKENS = 95, 4
"""The token that stands for a part of an image, and how many an image has."""
_TEXT = _LLAMA | {"head_dim": 8}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MULTIMODAL = [
    TinyFamily(
        "gemma3",
        {"text_config": _TEXT | {"model_type": "gemma3_text", "sliding_window": 32}}
        | {"vision_config": _VISION | {"model_type": "siglip_vision_model"}}
        | {"image_token_id": IMAGE, "boi_token_id": 94, "eoi_token_id": 93, "mm_tokens_per_image": IMAGE_TOKENS},
    ),
    TinyFamily(
        "llava",
        {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION | {"model_type": "clip_vision_model"}}
        | {"image_token_index": IMAGE},
    ),
    TinyFamily(
        "qwen2_5_vl",
        {"text_config": _TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": _MROPE}}
        | {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}}
        | {"image_token_id": IMAGE, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92},
    ),
    TinyFamily(
        "smolvlm",
        {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION | {"model_type": "smolvlm_vision"}}
        | {"image_token_id": IMAGE, "scale_factor": 1},
    ),
]
"""Language models inside others: with a norm on the MLP's output, as it is, and with positions in three dimensions."""


def image_inputs(model_type: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """One image wherever the ids ``[rows, positions]`` have place for one, and what a processor gives besides."""
    generator, images = torch.Generator().manual_seed(0), int((ids == IMAGE).sum()) // IMAGE_TOKENS
    kinds = (ids == IMAGE).long()
    given = {"token_type_ids": kinds} if model_type == "gemma3" else {}
    given = {"mm_token_type_ids": kinds} if model_type == "qwen2_5_vl" else given
    if not images:
        return given
    if model_type == "qwen2_5_vl":
        patches = torch.randn(4 * IMAGE_TOKENS, 3 * 2 * 14 * 14, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        return given | {"pixel_values": patches.repeat(images, 1), "image_grid_thw": grid.repeat(images, 1)}
    image = torch.randn(1, 3, 28, 28, generator=generator)
    if model_type == "smolvlm":  # each row has an image; one that is black is none
        return {"pixel_values": (ids == IMAGE).any(dim=1)[:, None, None, None, None] * image}
    return given | {"pixel_values": image.repeat(images, 1, 1, 1)}


WIDE = {
    "n_embd": 64,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "head_dim": 32,
    "rotary_dim": 16,
    "n_head": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "mrope_section": [8, 4, 4],
    "out_hidden_size": 64,
}
"""The least that vLLM's attention has kernels for: heads of 32."""


def widened(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes of `WIDE` in a configuration and those inside it."""
    return {name: widened(value) if isinstance(value, dict) else WIDE.get(name, value) for name, value in config.items()}


def tiny_model(model_type: str, config: dict[str, Any], *, seed: int = 0) -> Any:  # its modules have no static types
    """A randomly initialised model, with norms and biases that are not the identity."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if text := config.get("text_config"):
        tied = text["tie_word_embeddings"]
        settings = AutoConfig.for_model(model_type, **(config | {"text_config": common | text, "tie_word_embeddings": tied}))
    else:
        settings = AutoConfig.for_model(model_type, **(common | config))
    model = auto_class(settings).from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" in name or "wte" in name or "lm_head" in name or "embed_out" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif name.endswith("mm_input_projection_weight"):  # which begins as zero: no image would be seen
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``t1 … t95``, and ``<eos>`` with id 0, which it does not put in front of a text."""
    vocabulary = {"<eos>": 0} | {f"t{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", unk_token="<eos>")


SEEING_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text }}{% endif %} {% endfor %}{% endfor %}"
)


def tiny_processor(model_type: str) -> Any:
    """Processor of the tiny LLaVA or Gemma 3: a word stands for an image, and no control token."""
    from transformers import CLIPImageProcessorPil, Gemma3ImageProcessorPil, Gemma3Processor, LlavaProcessor

    tokenizer, size = tiny_tokenizer(), {"height": 28, "width": 28}
    tokenizer.add_tokens([AddedToken(f"t{i}", special=False) for i in (93, 94, IMAGE)])
    if model_type == "llava":
        return LlavaProcessor(
            CLIPImageProcessorPil(size=size, do_center_crop=False),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            image_token=f"t{IMAGE}",
            num_additional_image_tokens=1,
            chat_template=SEEING_TEMPLATE.replace("IMAGE", f"t{IMAGE}"),
        )
    for name, i in (("boi", 94), ("image", IMAGE), ("eoi", 93)):
        setattr(tokenizer, f"{name}_token", f"t{i}")
        setattr(tokenizer, f"{name}_token_id", i)
    template = SEEING_TEMPLATE.replace("IMAGE", "t94")
    return Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, chat_template=template, image_seq_length=IMAGE_TOKENS)


CHAT_TEMPLATE = (
    """{{ bos_token }} {% for message in messages %}<|start|> {{ message.role }} {{ message.content }} <|end|> {% endfor %}"""
)


def chat_tokenizer(template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with role markers (ids 94 and 95) and roles, and a chat template that writes BOS."""
    vocabulary = {"<eos>": 0} | {f"t{i}": i for i in range(1, 92)} | {"user": 92, "assistant": 93, "<|start|>": 94, "<|end|>": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", unk_token="<eos>", chat_template=template
    )


def zipf_texts(documents: int = 8, words: int = 120, *, seed: int = 0) -> list[str]:
    """Documents of words whose frequency falls with their id."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, VOCAB)
    return [
        " ".join(f"t{int(i) + 1}" for i in torch.multinomial(weights, words, replacement=True, generator=generator))
        for _ in range(documents)
    ]


NULL_DIMS = 4
ENTROPY_NEURONS = {5: 1, 11: -1}
"""Planted neurons and the sign with which each raises the entropy."""
FREQUENCY_NEURON, FREQUENCY_SIGN = 20, -1
"""Planted neuron that lowers frequent tokens, so that the output comes closer to unigram when it is turned down."""


def planted_model(model_type: str, counts: torch.Tensor, *, wide: bool = False, tied: bool = False) -> Any:
    """A tiny model with an exact null space, two entropy neurons in it and one token-frequency neuron.

    The last `NULL_DIMS` dimensions of the residual are not read by the unembedding and written by nothing but the entropy
    neurons and a constant: neuron 5 adds to the constant (a larger norm, smaller logits, higher entropy) and neuron 11
    takes from it. The frequency neuron's write is the one whose logits follow the unigram direction best.

    With `tied` embeddings only the frequency neuron is planted: what the unembedding does not read, the embedding cannot hold.
    """
    config = {family.model_type: family.config for family in (*FAMILIES, *MULTIMODAL)}[model_type]
    config = widened(config) if wide else config
    text = config.get("text_config", config) | {"tie_word_embeddings": tied}
    model = tiny_model(model_type, config | {"text_config": text} if "text_config" in config else text)
    anatomy = locate(model)
    norm = read_norm(anatomy.final_norm, anatomy.d_model)
    with torch.no_grad():
        for module in filter(None, (anatomy.final_norm, anatomy.write_norm)):
            for _, weight in filter(lambda named: named[0] == "weight", module.named_parameters()):
                # A gain of one, which is a weight of zero where the module adds one to it.
                weight.sub_(read_norm(module, anatomy.d_model).gain - 1)
        stored = anatomy.down_proj.get_parameter("weight")
        w_out = stored if isinstance(anatomy.down_proj, Conv1D) else stored.T  # [neurons, d_model]
        if anatomy.write_norm is not None:
            # The planted writes must not make up most of what the norm divides by.
            w_out.mul_(50)
        if not tied:
            _plant_entropy(model, anatomy, w_out)
        log_frequency = ((counts + 1) / (counts + 1).sum()).log()
        # Make the unembedding able to express the direction exactly through one residual dimension.
        anatomy.unembedding.get_parameter("weight")[:, 0] = 0.3 * (log_frequency - log_frequency.mean())
        w_out[FREQUENCY_NEURON] = 0
        w_out[FREQUENCY_NEURON, 0] = -12.0 if anatomy.write_norm is not None else -2.0
        if norm.centred:
            # A write that sums to zero and reads out as dimension 0 alone: the rest goes where nothing is read.
            w_out[FREQUENCY_NEURON, -NULL_DIMS:] = -w_out[FREQUENCY_NEURON, 0] / NULL_DIMS
    return model


def _plant_entropy(model: Any, anatomy: Anatomy, w_out: torch.Tensor) -> None:
    """Give `model` a null space, and entropy neurons that write into it."""
    anatomy.unembedding.get_parameter("weight")[:, -NULL_DIMS:] = 0
    # Nothing else writes into the null space; its content is a constant that comes in with the embeddings.
    for module in model.modules():
        if isinstance(module, Conv1D | nn.Linear) and module is not anatomy.unembedding:
            into = module.weight.T if isinstance(module, Conv1D) else module.weight
            if into.shape[0] == anatomy.d_model:
                into[-NULL_DIMS:] = 0
                if module.bias is not None:
                    module.bias[-NULL_DIMS:] = 0
        elif isinstance(module, nn.Embedding):
            module.weight[..., -NULL_DIMS:] = 0
    # Zero-sum, so that a LayerNorm's centring takes nothing away from it.
    constant = torch.tensor([1.0, -1.0, 1.0, -1.0])
    model.get_input_embeddings().weight[:, -NULL_DIMS:] = 2 * constant
    if anatomy.write_norm is not None:
        # GLM-4's layers write more: their norms have gains above one.
        model.get_input_embeddings().weight[:, -NULL_DIMS:] *= 3 if model.config.model_type == "glm4" else 2
    for neuron, sign in ENTROPY_NEURONS.items():
        w_out[neuron] = 0
        w_out[neuron, -NULL_DIMS:] = 4 * sign * constant
