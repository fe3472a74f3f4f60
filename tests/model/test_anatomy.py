from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from confsteer import UnsupportedModelError
from confsteer.model.anatomy import LastLayerStates, weights_content
from confsteer.model.dissect import dissect
from confsteer.model.layers import read_norm
from confsteer.model.loading import auto_class
from confsteer.model.locate import locate
from tests.models import FAMILIES, VOCAB, TinyFamily, tiny_model


@pytest.fixture(params=FAMILIES, ids=lambda family: family.model_type)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    assert isinstance(request.param, TinyFamily)
    return request.param


LLAMA = ("model.layers.1", "mlp.down_proj", "model.norm")


def config_of(model_type: str) -> dict[str, Any]:
    return next(family.config for family in FAMILIES if family.model_type == model_type)


def test_readout_reproduces_the_models_probabilities(family: TinyFamily) -> None:
    model = tiny_model(*family)
    anatomy = dissect(model)
    ids = torch.randint(0, VOCAB, (2, 9))
    states: list[LastLayerStates] = []
    with torch.no_grad(), anatomy.recording(states.append):
        logits = model(ids, use_cache=False).logits
    ours = anatomy.readout().logits(states[0].residual).log_softmax(-1)
    torch.testing.assert_close(ours, logits.flatten(0, 1).log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_every_neuron_moves_the_logits_by_the_closed_form(family: TinyFamily) -> None:
    """The model run with one activation changed, against the readout of ``residual + δ w_i``."""
    model = tiny_model(*family)
    anatomy = dissect(model)
    readout = anatomy.readout()
    ids = torch.randint(0, VOCAB, (1, 5))
    states: list[LastLayerStates] = []
    with torch.no_grad(), anatomy.recording(states.append):
        model(ids, use_cache=False)
    for neuron in (0, 17, anatomy.n_neurons - 1):

        def push(module: nn.Module, args: tuple[torch.Tensor], neuron: int = neuron) -> tuple[torch.Tensor]:
            changed = args[0].clone()
            changed[..., neuron] += 1.5
            return (changed,)

        handle = anatomy.down_proj.register_forward_pre_hook(push)
        with torch.no_grad():
            theirs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        handle.remove()
        change = torch.zeros(len(ids[0]), anatomy.n_neurons)
        change[:, neuron] = 1.5
        state = readout.state(states[0].residual, states[0].mlp_output)
        ours = readout.logits(readout.residual_after(state, change)).log_softmax(-1)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        move = readout.move(state, change).at(0)
        x = state.directions @ readout.unembedding.T
        moved = x[-1] + readout.logit_bias + move.write[:, neuron, None] * (readout.unembedding @ readout.w_out[neuron])
        moved += sum(along[:, neuron, None] * direction for along, direction in zip(move.along, x, strict=True))
        torch.testing.assert_close(readout.cap(moved).log_softmax(-1), theirs, atol=1e-4, rtol=1e-4)


PLACES: dict[str, tuple[str, ...]] = {
    "exaone4": (*LLAMA, "post_feedforward_layernorm"),
    "falcon": ("transformer.h.1", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "gemma2": (*LLAMA, "post_feedforward_layernorm"),
    "gemma3_text": (*LLAMA, "post_feedforward_layernorm"),
    "gemma4_text": (*LLAMA, "post_feedforward_layernorm"),
    "glm4": (*LLAMA, "post_mlp_layernorm"),
    "gpt2": ("transformer.h.1", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neo": ("transformer.h.1", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers.1", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    "gptj": ("transformer.h.1", "mlp.fc_out", "transformer.ln_f"),
    "olmo2": (*LLAMA, "post_feedforward_layernorm"),
    "olmo3": (*LLAMA, "post_feedforward_layernorm"),
    "opt": ("model.decoder.layers.1", "fc2", "model.decoder.final_layer_norm"),
    "phi": ("model.layers.1", "mlp.fc2", "model.final_layernorm"),
    "starcoder2": ("model.layers.1", "mlp.c_proj", "model.norm"),
}
"""Last layer, projection, final norm and, where there is one, the norm on the MLP's output, as transformers' sources say."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_search_finds_what_the_sources_say(family: TinyFamily, device: str) -> None:
    """Without weights, too, where there are no values to compare."""
    layer, down_proj, final_norm, *write_norm = PLACES.get(family.model_type, LLAMA)
    model = tiny_model(*family).to(device)
    # As a scan lays it out: the other kinds of attention look at the mask.
    model.set_attn_implementation("eager")
    found, last_layer = locate(model), model.get_submodule(layer)
    assert (found.layer, found.last_layer) == (1, last_layer)
    assert found.down_proj is last_layer.get_submodule(down_proj)
    assert found.final_norm is model.get_submodule(final_norm)
    assert found.write_norm is (last_layer.get_submodule(write_norm[0]) if write_norm else None)


def test_a_model_whose_layers_change_is_searched_again() -> None:
    model = tiny_model("llama", config_of("llama"))
    assert locate(model).layer == 1
    model.model.layers = model.model.layers[:-1]
    assert dissect(model).down_proj is model.model.layers[0].mlp.down_proj


def test_half_precision_models_are_recognised() -> None:
    for family in FAMILIES:
        if family.model_type in ("gpt2", "llama", "gemma"):
            for dtype in (torch.bfloat16, torch.float16):
                dissect(tiny_model(*family).to(dtype))


def test_a_hidden_scale_on_the_logits_is_noticed() -> None:
    model = tiny_model("llama", config_of("llama"))
    model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(UnsupportedModelError, match="logits are not its unembedding"):
        dissect(model)


def test_a_hidden_scale_on_the_write_is_noticed() -> None:
    model = tiny_model("llama", config_of("llama"))
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.raises(UnsupportedModelError, match="does not move the residual"):
        dissect(model)


@pytest.mark.parametrize(
    ("model_type", "extra", "reason"),
    [
        ("jetmoe", {"kv_channels": 8}, r"mixture of experts \(mlp.input_linear, .*not kept as transformers keeps most"),
        ("cohere2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}, "does not move the residual"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(model_type: str, extra: dict[str, object], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        dissect(tiny_model(model_type, config_of("llama") | extra))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_a_model_without_an_mlp_is_refused_as_one(model_type: str, device: str) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=rf"the last layer of {model_type} has no MLP: .*\(mixer\.out_proj\)"):
        locate(model)


def test_attention_in_the_place_of_the_last_mlp_is_not_taken_for_one() -> None:
    """Its projection is from a wider space, too: there are more heads than fit."""
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4, "head_dim": 16}
    for layers, fits in (("M*-", True), ("M-*", False)):
        model = tiny_model("nemotron_h", config_of("llama") | sizes | {"hybrid_override_pattern": layers, "num_hidden_layers": 3})
        with contextlib.nullcontext() if fits else pytest.raises(UnsupportedModelError, match=r"no MLP: .*\(mixer\.o_proj\)"):
            dissect(model)


def test_layers_that_are_not_divided_into_blocks_are_searched() -> None:
    """Attention's projections beside those of the MLP."""
    config = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}
    model = tiny_model("xglm", config)
    assert dissect(model).down_proj is model.model.layers[-1].fc2


def test_an_encoder_decoder_is_refused() -> None:
    config = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        dissect(AutoModelForSeq2SeqLM.from_config(config))


def test_what_is_not_a_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        dissect(nn.Linear(2, 2))


def test_damaged_weights_are_refused() -> None:
    model = tiny_model("gpt2", config_of("gpt2"))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match="not finite"):
        dissect(model)


def test_looking_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2", config_of("gpt2"))
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    dissect(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class OddNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().amax(dim=-1, keepdim=True)


def test_norms_are_read_by_what_they_compute() -> None:
    layer_norm = nn.LayerNorm(16, eps=1e-3)
    with torch.no_grad():
        layer_norm.weight.normal_()
        layer_norm.bias.normal_()
    read = read_norm(layer_norm, 16)
    assert read.centred
    assert read.epsilon == 1e-3
    torch.testing.assert_close(read.gain, layer_norm.weight)
    rms_norm = nn.RMSNorm(16, eps=1e-5)
    assert not read_norm(rms_norm, 16).centred
    with pytest.raises(UnsupportedModelError, match=r"OddNorm .* of its weight, its bias and its eps \(or variance_epsilon\)"):
        read_norm(OddNorm(), 16)


def test_a_norm_is_known_by_the_name_of_its_class() -> None:
    model = tiny_model("llama", config_of("llama"))
    model.model.norm.__class__ = type("Scaled", (LlamaRMSNorm,), {})
    with pytest.raises(UnsupportedModelError, match="no module whose class has norm in its name runs between its last MLP"):
        dissect(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gain_of_hundreds_is_told_from_one_more(dtype: torch.dtype) -> None:
    """As of Gemma 3's MLP outputs; half precision rounds by as much."""
    weight = torch.linspace(5, 700, 640).to(dtype)
    for kind, offset in ((LlamaRMSNorm, 0), (Gemma3RMSNorm, 1)):
        norm = kind(640).to(dtype)
        norm.weight.data.copy_(weight)
        torch.testing.assert_close(read_norm(norm, 640).gain, weight.float() + offset, rtol=0, atol=0)


def test_fingerprints_survive_a_change_of_precision_but_not_of_weights() -> None:
    def model() -> Any:
        return tiny_model("gpt2", config_of("gpt2"))

    original = dissect(model()).fingerprints()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dissect(model().to(dtype)).matches(original)
    calibrated_in_half = dissect(model().to(torch.bfloat16)).fingerprints()
    assert dissect(model()).matches(calibrated_in_half)
    other = model()
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 0.5
    assert not dissect(other).matches(original)
    anatomy = dissect(model())
    assert anatomy.matches(original)
    with torch.no_grad():
        anatomy.unembedding.get_parameter("weight")[3, 3] += 0.5
    assert not anatomy.matches(original), "a digest must not outlive the weights it was taken of"


@pytest.mark.parametrize(
    ("model_type", "config", "sentence"),
    [
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "computes on after its MLP: per_layer_input_gate reads what the MLP"),
        (
            "bert",
            {"is_decoder": True},
            r"no final norm before its unembedding: .*\(cls.predictions.transform.dense\) stands between",
        ),
        ("cpmant", {"dim_ff": 64, "dim_head": 8}, r"one residual for each token .*reads \[2, 40, 32\]"),
        (
            "kosmos-2",
            {"text_config": {"embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 4}},
            "a text alone: .*pixel_values",
        ),
    ],
)
def test_what_stands_in_the_way_is_named(model_type: str, config: dict[str, Any], sentence: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCAB}
    settings = AutoConfig.for_model(model_type, **(sizes | config))
    model = auto_class(settings).from_config(settings).eval()
    with pytest.raises(UnsupportedModelError, match=sentence):
        dissect(model)


def test_auto_model_of_an_unknown_family_is_searched() -> None:
    config = AutoConfig.for_model("gpt_bigcode", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    anatomy = dissect(AutoModelForCausalLM.from_config(config).eval())
    assert anatomy.n_neurons == 128


def permute_columns(weight: torch.Tensor) -> None:
    """As a merge that first brings the neurons of two models into one order."""
    weight.data.copy_(weight.data.flip(1))


def exchange_rows(weight: torch.Tensor) -> None:
    weight.data[[3, 4]] = weight.data[[4, 3]]


def change_one_number(weight: torch.Tensor) -> None:
    weight.detach().numpy()[17, 5] += 0.1


def change_one_number_through_data(weight: torch.Tensor) -> None:
    weight.data[17, 5] *= 1.1


@pytest.mark.parametrize("write", [permute_columns, exchange_rows, change_one_number, change_one_number_through_data])
def test_weights_written_past_the_version_counter_are_other_weights(write: Any) -> None:
    for name in ("lm_head", "model.layers.1.mlp.down_proj"):
        model = tiny_model("llama", config_of("llama"))
        anatomy = dissect(model)
        anatomy.readout()
        before, weight = anatomy.fingerprints(), model.get_submodule(name).weight
        version = weight._version
        assert anatomy.matches(before)
        assert not anatomy.changed_since_readout
        write(weight)
        assert weight._version == version
        assert anatomy.changed_since_readout
        assert not anatomy.matches(before)
        anatomy.readout()
        assert not anatomy.changed_since_readout


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (0, 3), (3, 0), (5, 7), (6, 8), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_content_of_weights_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(float(torch.Size(shape).numel()), dtype=dtype).reshape(shape) + 1)
    before = weights_content(module)
    assert weights_content(module) == before
    assert before is not None
    module.weight.data.view(-1)[-1:].add_(1)
    assert (weights_content(module) != before) == (module.weight.numel() > 0)


def test_weights_that_other_processes_have_parts_of_are_refused(tmp_path: Path) -> None:
    """A DTensor over a single process is one all the same: the modules' inputs may be shards."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = tiny_model("llama", config_of("llama"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        anatomy = locate(model)
        weight = distribute_tensor(model.lm_head.weight.detach(), DeviceMesh("cpu", [0]), [Shard(0)])
        model.lm_head.weight = nn.Parameter(weight)
        for ask in (anatomy.readout, anatomy.fingerprints, lambda: anatomy.matches({"float32": "0"})):
            with pytest.raises(UnsupportedModelError, match=r"tensor parallel.*without tp_plan"):
                ask()
    finally:
        dist.destroy_process_group()
