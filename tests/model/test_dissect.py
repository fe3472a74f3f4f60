"""Models at hand that are not in the state they were loaded in: under autocast, adapters or a compiler."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from confsteer.model.anatomy import Anatomy
from confsteer.model.dissect import dissect
from confsteer.model.layers import without_adapter
from tests.models import FAMILIES, tiny_model


def fresh(model_type: str) -> Any:
    return tiny_model(*next(family for family in FAMILIES if family.model_type == model_type))


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return fresh(request.param)


def test_autocast_changes_nothing(model: Any) -> None:
    expected = dissect(fresh(model.config.model_type))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        anatomy = dissect(model)
        assert torch.equal(anatomy.readout().w_out, expected.readout().w_out)
        assert torch.is_autocast_enabled("cpu")
    assert anatomy.fingerprints() == expected.fingerprints()


def test_a_forward_that_casts_by_itself_is_accepted(model: Any) -> None:
    # Accelerate keeps the first precision of a process, which another test may have chosen.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert dissect(Accelerator(cpu=True, mixed_precision="bf16").prepare(model)).dtype == torch.float32
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_norms_in_another_precision_than_the_projections_are_accepted() -> None:
    """Training of a model with few bits per weight keeps its norms in float32 and computes in bfloat16."""
    model = fresh("llama").to(torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float()
    dissect(model)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_defaults_change_nothing(model: Any, default: torch.dtype) -> None:
    expected = dissect(fresh(model.config.model_type)).readout()
    state = torch.get_rng_state()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"), torch.inference_mode():
            readout = dissect(model).readout()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for name, theirs in vars(expected).items():
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(getattr(readout, name).float(), theirs, atol=1e-2, rtol=0)


def adapted(model: Any, how: str) -> Any:
    projections = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj"}[model.config.model_type]
    config = LoraConfig(r=2, target_modules=[projections, "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    if how == "PeftModel":
        return get_peft_model(model, config).eval()
    if how == "inside a PeftModel":
        return get_peft_model(model, config).eval().get_base_model()
    if how == "transformers":
        model.add_adapter(config)
        return model.eval()
    return inject_adapter_in_model(config, model).eval()


@pytest.mark.parametrize("how", ["PeftModel", "inside a PeftModel", "transformers", "injected"])
def test_adapters_are_left_out_whoever_put_them_there(model: Any, how: str) -> None:
    expected = dissect(fresh(model.config.model_type))
    wrapped = adapted(model, how)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = wrapped(input_ids=ids).logits
    trained = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    anatomy = dissect(wrapped)
    assert anatomy.fingerprints() == expected.fingerprints()
    assert {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()} == trained
    with torch.no_grad():
        assert torch.equal(wrapped(input_ids=ids).logits, before)


def test_merged_adapters_stay_merged(model: Any) -> None:
    wrapped = adapted(model, "PeftModel")
    wrapped.merge_adapter()
    merged = dissect(wrapped).fingerprints()
    assert merged != dissect(fresh(model.config.model_type)).fingerprints()
    assert without_adapter(dissect(wrapped).down_proj) is not dissect(wrapped).down_proj
    assert all(getattr(module, "merged", True) for module in wrapped.modules())


def test_the_layer_around_an_adapter_is_found(model: Any) -> None:
    """Whether the model was looked at before the adapters came or not."""
    before = dissect(model)
    wrapped = adapted(model, "injected")
    found = dissect(wrapped)
    assert found.down_proj is not before.down_proj
    assert without_adapter(found.down_proj) is before.down_proj
    again = dissect(adapted(fresh(model.config.model_type), "injected"))
    assert (found.layer, type(found.down_proj)) == (again.layer, type(again.down_proj))


def test_threads_may_look_at_one_model_at_once(model: Any) -> None:
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(dissect, [model] * 4)
    assert others == [first] * 3


@pytest.mark.parametrize("seen", [True, False])
def test_parts_that_ran_compiled_are_found(model: Any, seen: bool) -> None:
    def modules(anatomy: Anatomy) -> list[torch.nn.Module]:
        return [anatomy.last_layer, anatomy.down_proj, anatomy.final_norm, anatomy.unembedding]

    other = fresh(model.config.model_type)
    expected = modules(dissect(other))
    path_of = {module: path for path, module in other.named_modules()}
    inside = [model.get_submodule(path_of[module]) for module in expected]
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    torch._dynamo.reset()
    if seen:
        dissect(model)
    layers[-1] = torch.compile(layers[-1], backend="eager")
    model.set_output_embeddings(torch.compile(model.get_output_embeddings(), backend="eager"))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(dissect, [model] * 4):
            assert all(map(lambda one, other: one is other, modules(found), inside))
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert list(map(type, inside)) == list(map(type, expected))
    torch._dynamo.reset()
