"""Which architectures of transformers confsteer steers: a tiny random model of every type that has a causal language model.

    OMP_NUM_THREADS=1 python eval/census.py                # all of them: a minute on one core
    OMP_NUM_THREADS=1 python eval/census.py llama gemma3   # some of them, printed alone

Every model type of ``AutoModelForCausalLM`` and ``AutoModelForImageTextToText`` is built with a few small layers, its norms,
biases and factors are made other than one, and `dissect` looks at it. That proves the closed form on the model at hand or
refuses it with a reason. `locate` is to find the same in a model without weights.

Writes census.json and census.md beside this script, and the README's sentence between its two marks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import click
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from confsteer.errors import ConfsteerError
from confsteer.model.anatomy import Anatomy
from confsteer.model.dissect import dissect
from confsteer.model.locate import locate

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARK = "<!-- census -->"
VERDICTS = ("works", "refused", "unbuilt", "crash")
SECONDS = 60
"""A model that takes longer to build is not tiny."""
LAYERS = 2
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_heads": 4}
TEXT: dict[str, Any] = HEADS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": 96, "max_position_embeddings": 64,
    "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_inner": 64, "n_positions": 64, "n_ctx": 64, "ffn_dim": 64, "d_model": 32,
    "n_layers": LAYERS, "n_heads": 4, "num_layers": LAYERS, "decoder_layers": LAYERS, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "word_embed_proj_dim": 32, "embedding_size": 32, "rotary_dim": 4, "ffn_hidden_size": 64,
    # Mixtures of experts, latent attention
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # State spaces
    "ssm_state_size": 8, "state_size": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
    # Attention in groups, inputs of each layer
    "num_attention_groups": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0,
    # Ids within the vocabulary
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHER: dict[str, Any] = HEADS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "image_size": 28, "patch_size": 14, "depth": LAYERS,
    "embed_dim": 32, "out_hidden_size": 32, "num_layers": LAYERS, "d_model": 32,
}  # fmt: skip
"""Sizes of what sees and hears."""
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
MROPE = ROPE | {"mrope_section": [2, 1, 1]}
"""Positions in three dimensions, half of a head in all."""
FACTORS = {
    "logit_scale": 0.25, "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "output_multiplier": 0.5, "residual_multiplier": 0.3,
    "mlp_multipliers": [0.9, 0.4], "final_logit_softcapping": 8.0, "logits_soft_cap": 8.0, "output_logit_soft_cap": 8.0,
}  # fmt: skip
"""Factors that are one, or too weak to be seen, in most default configs."""
LEFT_OUT = object()
SPECIAL: dict[str, dict[str, Any]] = {
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "chameleon": {"vocabulary_map": {"<image>": 95}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [1, 1, 2]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"vision_config": OTHER | {"model_type": "gemma4_vision"}},
    "diffusion_gemma_text": {"top_k_experts": 2},
    "emu3": {"vocabulary_map": {"<image>": 95}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 8], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "fast_vlm": {"vision_config": OTHER | {"model_type": "clip_vision_model"}},
    "florence_vision": {"patch_size": LEFT_OUT, "embed_dim": LEFT_OUT, "num_heads": LEFT_OUT},
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}},
    "glm4v_text": {"rope_parameters": MROPE},
    "glm_ocr_text": {"rope_parameters": MROPE},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0},
    "granite4_vision": {"text_config": TEXT | {"model_type": "granite", "logits_scaling": 4.0}, "deepstack_layer_map": [[-1, 0]],
                        "downsample_rate": "1/2"},
    "hunyuan_vl_text": {"rope_parameters": MROPE},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "llama4_text": {"moe_layers": LEFT_OUT, "intermediate_size_mlp": 64},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mistral4": {"head_dim": 16},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "perception_lm": {"vision_config": OTHER | {"model_type": "clip_vision_model"}},
    "prophetnet": {"num_hidden_layers": LEFT_OUT, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 94},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 94},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_head_dim": 8, "indexer_kv_heads": 1, "indexer_budget": 4,
                       "indexer_compress_ratio": 2},
    "radio": {"video_temporal_patch_size": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "attention_head_size": 8, "feed_forward_size": 64},
    "step3p5": {"sliding_window": 8},
    "xlnet": {"max_position_embeddings": LEFT_OUT},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""By the type of a config, what it needs besides."""


class Row(NamedTuple):
    """Outcome of one model type."""

    kind: str
    """``text`` or ``multimodal``."""
    model_type: str
    verdict: str
    """``works``, ``refused``, ``unbuilt`` (by this script) or ``crash``."""
    words: str
    """Class and number of neurons, or the reason."""
    on_disk: bool | None = None
    """Whether the last layer is found in a model without weights; None where it does not work with them."""


def types() -> Iterator[tuple[str, str, Any]]:
    """All model types with their kind and their auto class."""
    for kind, names, auto in (
        ("text", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
        ("multimodal", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
    ):
        for model_type in names:
            yield kind, model_type, auto


def shrunk(config: Any, *, text: bool) -> dict[str, Any]:
    """Arguments that make a config like `config` with small sizes, and those of the configs inside it."""
    inner = config.get_text_config() if text else None
    small: dict[str, Any] = {}
    for name in getattr(config, "sub_configs", {}):
        if (sub := getattr(config, name, None)) is not None:
            small[name] = shrunk(sub, text=sub is inner) | {"model_type": sub.model_type}
    small |= {name: value for name, value in (TEXT if text else OTHER).items() if _settable(config, name)}
    small |= {name: value for name, value in FACTORS.items() if text and _settable(config, name, given=True)}
    if "kv_lora_rank" in small:  # latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
    depth = next((n for name in ("num_hidden_layers", "n_layer", "num_layers") if (n := getattr(config, name, None))), 0)
    for name, value in config.to_dict().items():
        # One entry a layer.
        if isinstance(value, list) and depth > LAYERS and len(value) == depth and _settable(config, name):
            small[name] = [small.get(name, v) if isinstance(v, int) else v for v in value[-LAYERS:]]
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope:  # half of head_dim in all
        small["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    small |= SPECIAL.get(config.model_type, {})
    return {name: value for name, value in small.items() if value is not LEFT_OUT}


def _settable(config: Any, name: str, *, given: bool = False) -> bool:
    """Whether a config has a value of this name (other than None, if `given`), and may be given another."""
    own = getattr(type(config), getattr(type(config), "attribute_map", {}).get(name, name), None)
    if isinstance(own, property) and own.fset is None:
        return False
    try:
        return hasattr(config, name) and not (given and getattr(config, name) is None)
    except Exception:  # values that differ between layers may not be asked for as one
        return False


def build(model_type: str, auto: Any, device: str = "cpu") -> Any:
    """A tiny random model whose norms, biases and factors are not the identity."""
    kind: Any = CONFIG_MAPPING[model_type]
    config = kind(**shrunk(kind(), text=True))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "meta" else torch.float32
    with torch.device(device):
        model = auto.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    if device == "meta":
        return model
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings.add(id(getattr(model.get_output_embeddings(), "weight", None)))
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in embeddings:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    return model


def look_at(kind: str, model_type: str, auto: Any) -> Row:
    """Build a model of a type and dissect it."""
    try:
        with _time_limit():
            model: nn.Module = build(model_type, auto)
    except Exception as error:  # every config has reasons of its own
        return Row(kind, model_type, "unbuilt", f"{type(error).__name__}: {_line(error)}")
    try:
        anatomy = dissect(model)
    except ConfsteerError as error:
        return Row(kind, model_type, "refused", _line(error))
    except Exception as error:  # which is a bug
        return Row(kind, model_type, "crash", f"{type(error).__name__}: {_line(error)}")
    try:
        without = build(model_type, auto, device="meta")
        on_disk = _paths(without, locate(without)) == _paths(model, anatomy)
    except ConfsteerError:
        on_disk = False
    return Row(kind, model_type, "works", f"{type(model).__name__}, {anatomy.n_neurons} neurons", on_disk)


def _paths(model: nn.Module, anatomy: Anatomy) -> list[str | None]:
    path_of: dict[Any, str] = {module: path for path, module in model.named_modules()}
    return [path_of.get(m) for m in (anatomy.last_layer, anatomy.down_proj, anatomy.write_norm, anatomy.final_norm)]


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not built within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def write(rows: list[Row]) -> None:
    """Write the table as JSON and as text, and the README's sentence."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    (HERE / "census.json").write_text(json.dumps(versions | {"rows": [row._asdict() for row in rows]}, indent=1) + "\n")
    (HERE / "census.md").write_text(page(rows, versions))
    before, _, rest = README.read_text().partition(MARK)
    _, _, after = rest.partition(MARK)
    README.write_text(f"{before}{MARK}\n{sentence(rows, versions)}\n{MARK}{after}")


def read() -> tuple[list[Row], dict[str, str]]:
    """Read the committed table, and the versions that it was made with."""
    table = json.loads((HERE / "census.json").read_text())
    return [Row(**row) for row in table.pop("rows")], table


def sentence(rows: list[Row], versions: dict[str, str]) -> str:
    """Say what the table says, for the README."""
    count = Counter(row.verdict for row in rows)
    reasons = Counter(reason(row) for row in rows if row.verdict == "refused")
    listed = ", ".join(f"{number} {words}" for words, number in reasons.most_common())
    return textwrap.fill(
        f"Of the {len(rows)} architectures of transformers {versions['transformers']} with a language model's head, "
        f"{count['works']} work as tiny random models, {count['refused']} are refused by name ({listed}), and "
        f"{count['unbuilt']} could not be built: [table](eval/census.md).",
        width=139,
        break_on_hyphens=False,
    )


REASONS = {
    "mixture of experts": "mixtures of experts",
    "no MLP": "without an MLP in the last layer",
    "encoder-decoder": "encoder-decoders",
    "no final norm before": "with a layer of their own before the unembedding, as encoders have",
    "text alone": "that read no text without an image",
    "computes on after": "whose last layer computes on after its MLP",
}
"""Part of a refusal, and what the README calls it."""


def reason(row: Row) -> str:
    """Name the kind of a refusal."""
    return next((words for part, words in REASONS.items() if part in row.words), "for other reasons")


def page(rows: list[Row], versions: dict[str, str]) -> str:
    """Write the table for readers."""
    count = Counter(row.verdict for row in rows)
    lines = [
        "# Which architectures confsteer steers",
        "",
        f"By `python eval/census.py`, with transformers {versions['transformers']} and torch {versions['torch']}: a tiny random "
        "model of every type of `AutoModelForCausalLM` (text) and `AutoModelForImageTextToText` (multimodal), built, its norms, "
        "biases and factors made other than one, and dissected. *Works* means that the closed form was proved on it: its logits "
        "are its unembedding applied to its final norm, and a neuron moves the residual by its output weights. *On disk* means "
        "that the last layer is also found without weights, as `confsteer scan` needs it.",
        "",
        "| | text | multimodal | |",
        "|---|---|---|---|",
    ]
    for verdict in VERDICTS:
        of_kind = [sum(row.verdict == verdict and row.kind == kind for row in rows) for kind in ("text", "multimodal")]
        lines.append(f"| {verdict} | {of_kind[0]} | {of_kind[1]} | {count[verdict]} |")
    for verdict, title, last in (
        ("works", "Works", "on disk"), ("refused", "Refused", "reason"), ("unbuilt", "Could not be built", "reason")
    ):  # fmt: skip
        lines += [
            "",
            f"## {title}",
            "",
            f"| type | kind | {'class' if verdict == 'works' else last} |" + (" on disk |" * (verdict == "works")),
        ]
        lines.append("|---|---|---|" + "---|" * (verdict == "works"))
        for row in sorted((row for row in rows if row.verdict == verdict), key=lambda row: (row.model_type, row.kind)):
            cell = row.words.replace("|", "\\|")
            lines.append(
                f"| {row.model_type} | {row.kind} | {cell} |"
                + (f" {'yes' if row.on_disk else 'no'} |" if verdict == "works" else "")
            )
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("only", nargs=-1)
def main(only: tuple[str, ...]) -> None:
    """Dissect a tiny model of every type, or of those named."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if unknown := sorted(set(only) - {model_type for _, model_type, _ in types()}):
        raise click.BadParameter(f"transformers {transformers.__version__} has no language model of type {', '.join(unknown)}")
    rows = []
    for kind, model_type, auto in types():
        if not only or model_type in only:
            rows.append(look_at(kind, model_type, auto))
            print(*rows[-1], flush=True)
    print(*(f"{number} {verdict}" for verdict, number in Counter(row.verdict for row in rows).items()), sep=", ")
    if not only:
        write(rows)


if __name__ == "__main__":
    main()
