from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import confsteer
from confsteer import ConfsteerError, NoNeuronsError, ProfileMismatchError, Steering, SteeringError, UnsupportedModelError
from confsteer.cli import main
from confsteer.runtimes.baking import new_folder
from tests.planted import Planted, planted

IDS = torch.randint(1, 96, (4, 10), generator=torch.Generator().manual_seed(5))
WITH_BIAS = ["gpt2", "gpt_neox", "opt"]
GIVEN_BIAS = ["llama", "granite", "smollm3"]
WITHOUT_BIAS = ["gemma2", "qwen2"]


def log_probabilities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits.log_softmax(-1)


def steered(found: Planted, steering: Steering) -> Tensor:
    with confsteer.steer(found.model, found.profile, steering):
        return log_probabilities(found.model)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def with_constant(found: Planted) -> list[Steering]:
    return [
        Steering(entropy=0.9 * found.profile.reach("entropy")[1]),
        Steering(scale={"entropy": 0.0}, unigram=0.9 * found.profile.reach("unigram")[1]),
        Steering(scale={5: 2.0, 20: -1.0}, shift={5: -0.5}, clamp={11: 0.3}),
    ]


def without_constant(found: Planted) -> Steering:
    mean = next(neuron.mean_activation for neuron in found.profile.steerable if neuron.index == 5)
    return Steering(scale={5: 30.0}, shift={5: -(1 - 30.0) * mean}, clamp={11: 0.0, 20: (0.0, 0.0)})


@pytest.mark.parametrize("model_type", [*WITH_BIAS, *GIVEN_BIAS, *WITHOUT_BIAS])
def test_the_checkpoint_computes_what_steering_does(model_type: str, tmp_path: Path) -> None:
    found = planted(model_type)
    unsteered = log_probabilities(found.model)
    possible = [without_constant(found)] + ([] if model_type in WITHOUT_BIAS else with_constant(found))
    for i, steering in enumerate(possible):
        model = copy.deepcopy(found.model)
        baked = confsteer.bake(model, found.profile, steering)
        model.save_pretrained(tmp_path / str(i))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(i)).eval()
        expected = steered(found, steering)
        torch.testing.assert_close(log_probabilities(loaded), expected, atol=1e-5, rtol=0)
        assert float((expected - unsteered).abs().max()) > 1e-3
        assert (baked.bias is None) == (i == 0)
        assert baked.mlp_bias_added == (model_type in GIVEN_BIAS and i > 0)
        # A bias that is new is zero, all but one; what else there was is as it was.
        before, after = state(found.model), state(loaded)
        changed = {name for name in after if not torch.equal(after[name], before.get(name, torch.zeros_like(after[name])))}
        assert changed == {baked.weight, baked.bias} - {None}
        assert (after.keys() == before.keys()) != baked.mlp_bias_added


def test_the_profile_fits_no_longer_once_output_weights_have_changed() -> None:
    found = planted("llama")
    model = copy.deepcopy(found.model)
    for request in ("entropy=0.1", "shift.5=0.01"):
        assert confsteer.bake(model, found.profile, request).weight is None
    both = steered(found, Steering(entropy=0.1, shift={5: 0.01}))
    torch.testing.assert_close(log_probabilities(model), both, atol=1e-5, rtol=0)
    assert confsteer.bake(model, found.profile, "scale.5=0").weight == "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ProfileMismatchError, match="other weights"), confsteer.steer(model, found.profile):
        pass
    with pytest.raises(ProfileMismatchError, match="other weights"):
        confsteer.bake(model, found.profile, "entropy=0.1")


NUMBER = st.floats(-3, 3, width=32)
LINEAR = st.builds(
    Steering,
    entropy=st.floats(-0.6, 1.5) | st.none(),
    unigram=st.floats(-0.1, 1.5) | st.none(),
    scale=st.dictionaries(st.sampled_from([5, 11, 20]), NUMBER),
    shift=st.dictionaries(st.sampled_from([5, "frequency"]), NUMBER),
    clamp=st.dictionaries(st.sampled_from([11, "frequency"]), NUMBER | NUMBER.map(lambda x: (x, x)) | st.just((None, None))),
)


@settings(max_examples=30, deadline=None)
@given(LINEAR)
def test_every_linear_steering_can_be_baked(steering: Steering) -> None:
    found = planted("gpt2")
    model = copy.deepcopy(found.model)
    expected = steered(found, steering)
    try:
        confsteer.bake(model, found.profile, steering)
    except SteeringError as error:
        assert "changes nothing" in str(error)
        assert torch.equal(expected, log_probabilities(found.model))
    torch.testing.assert_close(log_probabilities(model), expected, atol=1e-5, rtol=0)


def test_a_preset_is_written_out() -> None:
    found = planted("gpt2")
    profile = found.profile.with_preset("calm", Steering(entropy=0.3))
    model = copy.deepcopy(found.model)
    assert confsteer.bake(model, profile, "preset=calm unigram=0.1").steering == Steering(entropy=0.3, unigram=0.1)
    expected = steered(found, Steering(entropy=0.3, unigram=0.1))
    torch.testing.assert_close(log_probabilities(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    found = planted("gpt2")
    model = copy.deepcopy(found.model).to(dtype)
    projection = model.transformer.h[-1].mlp.c_proj
    weight, bias = projection.weight.detach().double(), projection.bias.detach().double()
    steering = Steering(scale={5: 0.3}, entropy=0.1)
    edit = found.profile.edit(steering)
    for neuron, gain, shift in zip(found.profile.steerable, edit.gain, edit.bias, strict=True):
        bias += float(shift) * weight[neuron.index]
        weight[neuron.index] *= float(gain)
    confsteer.bake(model, found.profile, steering)
    assert torch.equal(projection.weight, weight.to(dtype))
    assert torch.equal(projection.bias, bias.to(dtype))


@pytest.mark.parametrize(
    ("model_type", "steering", "error", "sentence"),
    [
        ("gpt2", {}, SteeringError, "neutral: changes nothing in the float32 weights"),
        ("gpt2", {"scale": {5: 1.0}}, SteeringError, "changes nothing"),
        ("gpt2", {"clamp": {5: [0.1, None], 11: 0.2}}, SteeringError, "keep neuron 5 in one"),
        ("gpt2", {"entropy": 0.1, "positions": "generated"}, SteeringError, "the same at all positions"),
        ("gpt2", {"entropy": 0.1, "positions": {"first": 3}}, SteeringError, "Steer while the model runs: confsteer.steer"),
        ("gpt2", {"entropy": 9.0}, SteeringError, "out of reach"),
        ("gpt2", {"preset": "x"}, SteeringError, "preset 'x'"),
        ("gemma2", {"entropy": 0.01}, SteeringError, r"has no bias to hold it.*clamp\.11=0, or .* scale\.11=0\.5 shift\.11="),
        ("qwen2", {"scale": {"entropy": 0.0}}, SteeringError, "has no bias"),
    ],
)
def test_what_cannot_be_baked_is_refused_and_changes_nothing(
    model_type: str, steering: dict[str, Any], error: type[ConfsteerError], sentence: str
) -> None:
    found = planted(model_type)
    before = state(found.model)
    with pytest.raises(error, match=sentence):
        confsteer.bake(found.model, found.profile, steering)
    assert same(state(found.model), before)


def test_the_way_out_that_a_refusal_names_is_one() -> None:
    found = planted("qwen2")
    with pytest.raises(SteeringError) as refused:
        confsteer.bake(found.model, found.profile, "entropy=0.1")
    words = [word.strip(",.") for word in str(refused.value).split()]
    first, *both = [word for word in words if word.startswith(("clamp.", "scale.", "shift."))]
    for way in (first, " ".join(both)):
        assert confsteer.bake(copy.deepcopy(found.model), found.profile, way).bias is None


def test_a_profile_of_another_model_or_of_none_is_refused() -> None:
    found, other = planted("gpt2"), planted("llama")
    with pytest.raises(ProfileMismatchError):
        confsteer.bake(other.model, found.profile, "entropy=0.1")
    empty = found.profile.model_copy(update={"entropy_neurons": (), "frequency_neurons": (), "response": {}})
    with pytest.raises(NoNeuronsError):
        confsteer.bake(found.model, empty, {})


def test_too_small_and_too_large_for_half_precision_are_refused() -> None:
    found = planted("gpt2")
    model = copy.deepcopy(found.model).half()
    before = state(model)
    mean = next(neuron.mean_activation for neuron in found.profile.steerable if neuron.index == 5)
    with pytest.raises(SteeringError, match="changes nothing in the float16 weights"):
        confsteer.bake(model, found.profile, Steering(scale={5: 1.0001}, shift={5: -(1 - 1.0001) * mean}))
    with pytest.raises(SteeringError, match="float16 cannot hold"):
        confsteer.bake(model, found.profile, Steering(scale={5: 1e6}))
    assert same(state(model), before)


def test_adapters_are_merged_first() -> None:
    from peft import LoraConfig, get_peft_model

    found = planted("llama")
    model = get_peft_model(copy.deepcopy(found.model), LoraConfig(r=2, target_modules=["q_proj"]))
    for adapted in (model, model.get_base_model()):
        with pytest.raises(UnsupportedModelError, match="merge them first"):
            confsteer.bake(adapted, found.profile, "entropy=0.1")
    merged: Any = model.merge_and_unload()
    confsteer.bake(merged, found.profile, "entropy=0.1")
    torch.testing.assert_close(log_probabilities(merged), steered(found, Steering(entropy=0.1)), atol=1e-5, rtol=0)


def test_quantised_offloaded_and_shared_weights_are_refused() -> None:
    from accelerate import cpu_offload

    found = planted("llama")
    offloaded = copy.deepcopy(found.model)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        confsteer.bake(offloaded, found.profile, "entropy=0.1")
    shared = copy.deepcopy(found.model)
    first, last = (layer.mlp.down_proj for layer in shared.model.layers)
    first.weight = last.weight
    with pytest.raises(UnsupportedModelError, match=r"shares its parameters \(model\.layers\.0\.mlp\.down_proj\.weight, "):
        confsteer.bake(shared, found.profile, "entropy=0.1")
    torchao = pytest.importorskip("torchao.quantization")
    quantised = copy.deepcopy(found.model)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    profile = confsteer.calibrate(quantised, found.tokenizer, found.texts, window=64)
    with pytest.raises(UnsupportedModelError, match="load it unquantised"):
        confsteer.bake(quantised, profile, "entropy=0.1")


def test_a_compiled_model_is_the_model_inside() -> None:
    found = planted("gpt2")
    model = copy.deepcopy(found.model)
    compiled: Any = torch.compile(model)
    confsteer.bake(compiled, found.profile, "entropy=0.2")
    torch.testing.assert_close(log_probabilities(model), steered(found, Steering(entropy=0.2)), atol=1e-5, rtol=0)


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/er"):
        with new_folder(tmp_path / name) as draft:
            (draft / "file").write_text("x")
            assert not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == "x"
    with pytest.raises(ConfsteerError, match="not an empty folder"), new_folder(tmp_path / "new"):
        pass
    with pytest.raises(ConfsteerError, match="not an empty folder"), new_folder(tmp_path / "new" / "file"):
        pass
    with pytest.raises(ConfsteerError, match="cannot write to"), new_folder(tmp_path / "new" / "file" / "under"):
        pass
    with pytest.raises(ConfsteerError, match="cannot write to"), new_folder(tmp_path / "filled"):
        (tmp_path / "filled" / "meanwhile").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "broken"):
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty", "deep", "filled"}


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bake", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bake")
    planted("llama").save(root)
    return root


def test_the_command_saves_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    found, out = planted("llama"), tmp_path / "baked"
    result = run(folder / "model", "-p", folder / "profile", "-s", "entropy=0.2", "--out", out)
    assert "Baked entropy=+0.2 into 2 neurons of layer 1" in result.output
    assert "model.layers.1.mlp.down_proj.bias" in result.output
    assert "mlp_bias in its config" in result.output
    assert "the profile still fits" in result.output
    assert f"vllm serve {out}" in result.output
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(log_probabilities(model), steered(found, Steering(entropy=0.2)), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(out)("t3 t5").input_ids == [3, 5]
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}
    assert json.loads((out / "confsteer.json").read_text()) == {
        "base_model": found.profile.model.id,
        "revision": None,
        "profile": found.profile.checksum,
        "steering": {"entropy": 0.2},
    }
    half = run(folder / "model", "-p", folder / "profile", "-s", "clamp.5=0", "--dtype", "bfloat16", "--out", tmp_path / "half")
    assert "mlp_bias" not in half.output
    assert "The profile does not fit these weights" in half.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_what_is_there_is_refused_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    result = run(tmp_path / "no-model", "-p", folder / "profile", "-s", "entropy=0.2", "--out", tmp_path / "out", code=1)
    assert "not an empty folder" in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.parametrize(
    ("steers", "code", "sentence"),
    [
        ([], 2, "give --steer once"),
        (["-s", "entropy=0.1", "-s", "unigram=0.1"], 2, "give --steer once"),
        (["-s", "clamp.5=0:1"], 1, "a range is not linear"),
        (["-s", "heat=9"], 1, "unknown key 'heat'"),
    ],
)
def test_the_command_says_what_is_wrong_and_leaves_nothing(
    folder: Path, tmp_path: Path, steers: list[str], code: int, sentence: str
) -> None:
    result = run(folder / "model", "-p", folder / "profile", *steers, "--out", tmp_path / "out", code=code)
    assert sentence in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full"), RuntimeError("a bug")], ids=repr)
def test_an_error_while_saving_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: object, path: Path, **options: Any) -> None:
        assert (path / "model.safetensors").exists()
        raise error

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    result = run(folder / "model", "-p", folder / "profile", "-s", "entropy=0.2", "--out", tmp_path / "out", code=1)
    assert ("cannot save the baked model: the disk is full" in result.output) == isinstance(error, OSError)
    assert isinstance(result.exception, SystemExit) or result.exception is error
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_code(self: object, path: Path, **options: Any) -> None:
        (path / "tokenization_own.py").write_text("")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", with_code)
    arguments = ("-p", folder / "profile", "-s", "entropy=0.2", "--out", tmp_path / "out")
    result = run(folder / "model", *arguments, code=1)
    assert "runs code of its own (tokenization_own.py)" in result.output
    assert list(tmp_path.iterdir()) == []
