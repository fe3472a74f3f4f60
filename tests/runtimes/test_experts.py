"""Steering a mixture of experts, against models whose experts are a loop in plain torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import confsteer
from confsteer import Profile, SteeringError
from confsteer.model.dissect import dissect
from confsteer.model.experts import MixtureAnatomy
from confsteer.profile.schema import ModelIdentity, Neuron
from tests.mixtures import MIXTURES, planted_experts, tiny_mixture
from tests.models import VOCAB, TinyFamily
from tests.planted import planted

Edit = Callable[[int, int, Tensor], Tensor]
"""From expert, number and activations (times the routing weight) to edited ones; the shared expert is number -1."""


@pytest.fixture(params=MIXTURES, ids=lambda family: family.model_type)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    assert isinstance(request.param, TinyFamily)
    return request.param


def profile_of(anatomy: MixtureAnatomy, neurons: dict[int, float]) -> Profile:
    """A profile of some neurons, by index, with their means."""
    base = planted("llama").profile
    model = base.model.model_dump() | {"n_neurons": anatomy.n_neurons, "experts": anatomy.experts, "d_model": anatomy.d_model}
    model |= {"layer": anatomy.layer, "vocab_size": anatomy.vocab_size, "fingerprints": anatomy.fingerprints()}
    first = base.entropy_neurons[0]
    made: list[Neuron] = []
    for index, mean in neurons.items():
        name = anatomy.experts.name(index)
        made.append(first.model_copy(update={"layer": anatomy.layer, "index": index, "name": name, "mean_activation": mean}))
    fields = {name: getattr(base, name) for name in Profile.model_fields if name not in ("columns_file", "frequency_neurons")}
    fields |= {"model": ModelIdentity(**model), "entropy_neurons": tuple(made), "response": {"entropy": base.response["entropy"]}}
    return Profile.create(columns=base.columns, frequency_neurons=(), **fields)


def naive_experts(module: Any, edit: Edit) -> Callable[..., Tensor]:
    """The experts as their formula has them, one token and one expert at a time."""
    kind = type(module).__name__
    transposed = kind in ("Llama4TextExperts", "GptOssExperts")

    def gated(projected: Tensor) -> Any:
        if kind == "GptOssExperts":
            gate, up = projected[::2].clamp(max=module.limit), projected[1::2].clamp(-module.limit, module.limit)
            return (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        if kind == "NemotronHExperts":
            return module.act_fn(projected)
        half = len(projected) // 2
        return module.act_fn(projected[:half]) * projected[half:]

    def one(x: Tensor, expert: int, weight: Tensor) -> Any:
        into = (module.up_proj if kind == "NemotronHExperts" else module.gate_up_proj)[expert]
        projected = (into.T if transposed else into) @ x
        if kind == "GptOssExperts":
            projected = projected + module.gate_up_proj_bias[expert]
        activations = weight * gated(projected)
        after = torch.stack([edit(expert, unit, a) for unit, a in enumerate(activations)])
        output = after @ (module.down_proj[expert] if transposed else module.down_proj[expert].T)
        return output + weight * module.down_proj_bias[expert] if kind == "GptOssExperts" else output

    def forward(x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        if index is None or weights is None:
            by_expert = x.view(module.num_experts, -1, x.shape[-1])
            routed = [[one(t, e, torch.ones(())) if t.any() else 0 * t for t in rows] for e, rows in enumerate(by_expert)]
            return torch.stack([torch.stack(rows) for rows in routed]).flatten(0, 1)
        chosen = zip(x, index.tolist(), weights, strict=True)
        return torch.stack([sum(one(t, e, w) for e, w in zip(es, ws, strict=True)) for t, es, ws in chosen])

    return forward


def test_steering_is_the_edit_of_a_loop_over_experts(family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clamp that some tokens reach, a gain about the mean and a shift, in three experts and the shared one."""
    model = tiny_mixture(family.model_type)
    anatomy = dissect(model)
    assert isinstance(anatomy, MixtureAnatomy)
    experts, n = anatomy.experts, anatomy.experts.units
    neurons = {5: 0.1, n + 7: -0.2, 3 * n + 11: 0.0} | ({experts.n_routed + 3: 0.3} if experts.shared else {})
    profile = profile_of(anatomy, neurons)
    request: dict[str, Any] = {"scale": {"0.5": -1.5}, "shift": {"1.7": 2.0}, "clamp": {"3.11": (0.01, None)}}
    if experts.shared:
        request["scale"]["shared.3"] = 3.0
    ids = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits.log_softmax(-1)
        with confsteer.steer(model, profile, request):
            steered = model(ids, use_cache=False).logits.log_softmax(-1)
        assert torch.equal(model(ids, use_cache=False).logits.log_softmax(-1), before)

        def edit(expert: int, unit: int, a: Tensor) -> Tensor:
            edits = {(0, 5): -1.5 * a + 2.5 * 0.1, (1, 7): a + 2.0, (3, 11): a.clamp(min=0.01)}
            return edits.get((expert, unit), a)

        monkeypatch.setattr(anatomy.down_proj, "forward", naive_experts(anatomy.down_proj, edit))
        if anatomy.shared is not None:
            _edit_shared(model, anatomy, lambda a: 3.0 * a - 2.0 * 0.3)
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
    torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)
    assert float((steered - before).abs().max()) > 1e-2


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
def test_steering_is_the_same_whatever_kernel_runs_the_experts(kernel: str) -> None:
    found = planted_experts("gpt_oss")
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), confsteer.steer(found.model, found.profile, entropy=0.2):
        expected = found.model(ids, use_cache=False).logits
        before = found.model.config._experts_implementation
        try:
            found.model.set_experts_implementation(kernel)
            torch.testing.assert_close(found.model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        finally:
            found.model.set_experts_implementation(before)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text", "qwen2_moe"])
def test_each_row_of_a_batch_follows_its_own_steering(model_type: str) -> None:
    found = planted_experts(model_type)
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    requests: list[Any] = [{"entropy": 0.1}, {"scale": {"entropy": -2.0}, "shift": {"2.3": 1.0}}]
    with torch.no_grad():
        alone = []
        for row, request in zip(ids, requests, strict=True):
            with confsteer.steer(found.model, found.profile, request):
                alone.append(found.model(row[None], use_cache=False).logits[0])
        with confsteer.steer(found.model, found.profile, requests):
            together = found.model(ids, use_cache=False).logits
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text", "qwen2_moe"])
def test_only_the_position_that_generates_is_steered_if_asked(model_type: str) -> None:
    found = planted_experts(model_type)
    ids = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = found.model(ids, use_cache=False).logits
        with confsteer.steer(found.model, found.profile, entropy=0.3):
            everywhere = found.model(ids, use_cache=False).logits
        with confsteer.steer(found.model, found.profile, entropy=0.3, positions="generated"):
            last = found.model(ids, use_cache=False).logits
    torch.testing.assert_close(last, torch.cat([before[:, :-1], everywhere[:, -1:]], dim=1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, -1], everywhere[:, -1])


def test_a_compiled_model_is_steered() -> None:
    found = planted_experts("qwen2_moe")
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad(), confsteer.steer(found.model, found.profile, entropy=0.2) as steerer:
        compiled: Any = torch.compile(found.model, backend="eager")
        for entropy in (0.2, -0.1):
            steerer.update(entropy=entropy)
            expected = found.model(ids, use_cache=False).logits
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_a_neutral_steering_changes_no_bit() -> None:
    for model_type in ("deepseek_v3", "llama4_text", "mixtral"):
        found = planted_experts(model_type)
        ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = found.model(ids, use_cache=False).logits
            with confsteer.steer(found.model, found.profile):
                assert torch.equal(found.model(ids, use_cache=False).logits, before)


def test_wrong_names_are_refused_with_those_that_are_right() -> None:
    found = planted_experts("deepseek_v3")
    with pytest.raises(SteeringError, match=r"neuron 3\.1: not in the profile of .*, which has shared\.7, 1\.5, 2\.3"):
        found.profile.edit(confsteer.Steering(scale={"3.1": 0}))
    with pytest.raises(SteeringError, match=r"neuron 5: not in the profile"):
        found.profile.edit(confsteer.Steering(scale={5: 0}))
    for key in ("3.017", "3.", "shared", "-1.2", "3.1.4"):
        with pytest.raises(SteeringError, match=r"scale"):
            confsteer.Steering.parse({"scale": {key: 0}})
    steering = confsteer.Steering.parse("scale.3.17=0 clamp.shared.2=:1")
    assert steering == confsteer.Steering(scale={"3.17": 0}, clamp={"shared.2": (None, 1.0)})
    assert confsteer.Steering.parse(str(steering)) == steering


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text", "mixtral", "qwen2_moe"])
def test_gains_are_baked_into_the_rows_of_experts(model_type: str) -> None:
    found = planted_experts(model_type)
    model = copy.deepcopy(found.model)
    first, second, _ = found.profile.steerable
    steering = {
        "clamp": {first.key: 0.0},
        "scale": {second.key: 0.5},
        "shift": {second.key: -0.5 * second.mean_activation},
    }
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with confsteer.steer(model, found.profile, steering):
            expected = model(ids, use_cache=False).logits
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        baked = confsteer.bake(model, found.profile, steering)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert baked.weight is not None
    assert changed == set(baked.weight.split(" and "))
    assert baked.neurons == (first.index, second.index)


def test_a_constant_cannot_be_baked_into_an_expert() -> None:
    found = planted_experts("gpt_oss")
    before = found.model.state_dict()["model.layers.1.mlp.experts.down_proj"].clone()
    with pytest.raises(SteeringError, match=r"adds a constant where neuron 3\.7, 1\.5 is active.*clamp\.3\.7=0"):
        confsteer.bake(found.model, found.profile, {"entropy": 0.1})
    assert torch.equal(found.model.state_dict()["model.layers.1.mlp.experts.down_proj"], before)


def test_a_profile_of_experts_has_a_format_of_its_own(tmp_path: Path) -> None:
    planted_experts("mixtral").profile.save(tmp_path)
    assert json.loads((tmp_path / "profile.json").read_text())["format_version"] == 2


def _edit_shared(model: Any, anatomy: MixtureAnatomy, edit: Callable[[Tensor], Tensor]) -> None:
    """Edit number 3 of the shared expert, times its gate if it has one: the gate itself is computed once more for that."""
    gates: list[Tensor] = []

    def note_gate(module: nn.Module, args: tuple[Any, ...]) -> None:
        gates.append(torch.ones(()) if anatomy.shared_gate is None else anatomy.shared_gate(args[0]).sigmoid())

    def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        after, gate = args[0].clone(), gates.pop().squeeze(-1)
        after[..., 3] = edit(gate * after[..., 3]) / gate
        return (after,)

    assert anatomy.shared_mlp is not None
    assert anatomy.shared is not None
    anatomy.shared_mlp.register_forward_pre_hook(note_gate)
    anatomy.shared.register_forward_pre_hook(change)
