"""What is written for llama.cpp: files whose mathematics, done in torch, is the steering."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import confsteer
from confsteer import ProfileMismatchError, Steering, SteeringError, UnsupportedModelError
from confsteer.cli import main
from confsteer.model.checkpoint import LastLayer, read_last_layer
from confsteer.model.locate import locate
from confsteer.runtimes.llamacpp.adapters import export
from confsteer.runtimes.llamacpp.after_norm import dial_after_norm
from confsteer.runtimes.llamacpp.ladder import ladder
from confsteer.runtimes.llamacpp.per_nat import readings
from confsteer.steering import DIALS
from confsteer.text.windows import make_windows
from tests.model import gguf_files
from tests.planted import Planted, planted

IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(5))
FILE_NAMES = ("control-vector", "lora")


def on_disk(found: Planted, folder: Path) -> LastLayer:
    found.model.save_pretrained(folder)
    return read_last_layer(str(folder))


def log_probabilities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits.log_softmax(-1)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file, by the reader of the package gguf."""
    reader = gguf.GGUFReader(path)
    says = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return says, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def as_llama_cpp_does(model: nn.Module, vector: Path | None, lora: Path | None, *, layer: int, scale: float = 1.0) -> Tensor:
    """Log-probabilities of a model under a control vector and a LoRA, both done in torch as llama.cpp does them."""
    model = copy.deepcopy(model)
    anatomy = locate(model)
    if lora is not None:
        says, tensors = read(lora)
        a, b = tensors[f"blk.{layer}.ffn_down.weight.lora_a"], tensors[f"blk.{layer}.ffn_down.weight.lora_b"]
        delta = scale * says["adapter.lora.alpha"] / len(a) * b @ a  # [d_model, n_neurons]
        weight = anatomy.down_proj.get_parameter("weight")
        with torch.no_grad():
            weight.add_(delta if weight.shape == delta.shape else delta.T)
    if vector is not None:
        direction = read(vector)[1][f"direction.{layer}"]
        anatomy.final_norm.register_forward_pre_hook(lambda module, args: (args[0] + scale * direction, *args[1:]))
    return log_probabilities(model)


def steerings(found: Planted) -> list[tuple[Steering, tuple[str, ...]]]:
    """Steerings and the files that they take."""
    mean = next(neuron.mean_activation for neuron in found.profile.steerable if neuron.index == 5)
    high = found.profile.reach("entropy")[1]
    return [
        (Steering(entropy=0.9 * high), ("control-vector",)),
        (Steering(shift={5: 0.3}, unigram=0.5 * found.profile.reach("unigram")[0]), ("control-vector",)),
        (Steering(scale={5: 3.0}, shift={5: -(1 - 3.0) * mean}, clamp={20: 0.0}), ("lora",)),
        (Steering(entropy=0.5 * high, scale={"entropy": 0.0, 20: -1.0}), FILE_NAMES),
    ]


def files_in(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {kind.replace("-", "_"): folder / f"{kind}.gguf" if kind in kinds else None for kind in FILE_NAMES}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "granite"])
def test_the_files_are_the_steering(model_type: str, tmp_path: Path) -> None:
    found = planted(model_type)
    last, unsteered = on_disk(found, tmp_path / "model"), log_probabilities(found.model)
    for steering, kinds in steerings(found):
        files = files_in(tmp_path, kinds)
        written = export(steering, found.profile, last, **files)
        with confsteer.steer(found.model, found.profile, steering):
            expected = log_probabilities(found.model)
        given = as_llama_cpp_does(found.model, files["control_vector"], files["lora"], layer=written.parts.layer)
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
        assert float((expected - unsteered).abs().max()) > 1e-3


def test_a_scale_is_that_of_the_change(tmp_path: Path) -> None:
    """Half of the files: half of the constant, and gains half way to 1."""
    found = planted("llama")
    last = on_disk(found, tmp_path / "model")
    vector, lora = tmp_path / "v.gguf", tmp_path / "l.gguf"
    export(Steering(scale={5: 3.0}, shift={20: 1.0}), found.profile, last, control_vector=vector, lora=lora)
    given = as_llama_cpp_does(found.model, vector, lora, layer=1, scale=0.5)
    with confsteer.steer(found.model, found.profile, Steering(scale={5: 2.0}, shift={20: 0.5})):
        torch.testing.assert_close(given, log_probabilities(found.model), atol=1e-5, rtol=0)


def test_gains_go_before_a_norm_and_constants_do_not(tmp_path: Path) -> None:
    found = planted("gemma2")
    last, lora = on_disk(found, tmp_path / "model"), tmp_path / "l.gguf"
    multiplied = steerings(found)[2][0]
    export(multiplied, found.profile, last, lora=lora)
    with confsteer.steer(found.model, found.profile, multiplied):
        expected = log_probabilities(found.model)
    torch.testing.assert_close(as_llama_cpp_does(found.model, None, lora, layer=1), expected, atol=1e-5, rtol=0)
    with pytest.raises(SteeringError, match="which a norm divides by its size") as refused:
        export(Steering.parse("entropy=0.01"), found.profile, last, control_vector=tmp_path / "v.gguf")
    assert not (tmp_path / "v.gguf").exists()
    # The way out that it names is one.
    way = re.findall(r"(?:scale|shift)\.\d+=[-\d.e]*\d", str(refused.value))
    export(Steering.parse(" ".join(way)), found.profile, last, lora=lora)


def test_a_dial_after_a_norm_does_what_was_measured_on_its_text(tmp_path: Path) -> None:
    """By the model itself with the constant before its final norm, on either half of the text."""
    found = planted("gemma2")
    last, vector = on_disk(found, tmp_path / "model"), tmp_path / "v.gguf"
    windows = make_windows(found.texts, found.tokenizer, window=64, source="zipf")
    dial = dial_after_norm(found.model, windows, found.profile)
    batch = next(windows.batches(len(windows)))

    def entropy(constant: Tensor | None) -> Tensor:
        hook = locate(found.model).final_norm.register_forward_pre_hook(
            lambda module, args: args if constant is None else (args[0] + constant, *args[1:])
        )
        with torch.no_grad():
            log_p = found.model(batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
        hook.remove()
        per_token, half = torch.special.entr(log_p.exp()).sum(-1), len(windows) // 2
        return torch.stack([per_token[rows][batch.kept[rows]].mean() for rows in (slice(half), slice(half, None))])

    for change in (-0.02, 0.02):
        written = export(Steering(entropy=change), found.profile, last, control_vector=vector, after_norm=dial)
        given = entropy(read(vector)[1]["direction.1"]) - entropy(None)
        assert written.halves
        torch.testing.assert_close(given, torch.tensor(written.halves), atol=1e-3, rtol=0)
        assert sum(written.halves) / 2 == pytest.approx(change)
    says = read(vector)[0]
    assert says["confsteer.measured"].endswith("on the halves of zipf")
    for asked, how in ((Steering(unigram=0.01), False), (Steering(entropy=0.01), True)):
        with pytest.raises(SteeringError, match="which a norm divides"):
            export(asked, found.profile, last, control_vector=vector, after_norm=dial, scale_per_nat=how)
    with pytest.raises(SteeringError, match="out of reach after the norm: on zipf"):
        dial.at(50.0)
    llama = planted("llama")
    with pytest.raises(UnsupportedModelError, match="a control vector is the dial itself"):
        dial_after_norm(llama.model, windows, llama.profile)


def test_the_metadata_says_what_a_file_is(tmp_path: Path) -> None:
    found = planted("llama")
    profile = found.profile.with_preset("calm", Steering(scale={5: 0.0}, unigram=0.1))
    # A path on this machine is nobody's business.
    profile = profile.model_copy(update={"model": profile.model.model_copy(update={"id": f"{tmp_path}/calm-llama"})})
    last = on_disk(found, tmp_path / "model")
    vector, lora = tmp_path / "v.gguf", tmp_path / "l.gguf"
    export(Steering.parse("preset=calm entropy=0.2"), profile, last, control_vector=vector, lora=lora)
    for path, architecture in ((vector, "controlvector"), (lora, "llama")):
        says, tensors = read(path)
        assert says["general.architecture"] == architecture
        assert says["confsteer.model"] == "calm-llama"
        assert str(tmp_path) not in str(says)
        assert says["confsteer.profile"] == profile.checksum
        assert Steering.parse(says["confsteer.steering"]) == Steering(entropy=0.2, unigram=0.1, scale={5: 0.0})
        for dial in DIALS:
            reach = says[f"confsteer.{dial}.low"], says[f"confsteer.{dial}.high"]
            assert reach == pytest.approx(profile.reach(dial), rel=1e-6)
    assert set(read(vector)[1]) == {"direction.1"}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "blk.1.ffn_down.weight.lora_a": (1, 64),
        "blk.1.ffn_down.weight.lora_b": (32, 1),
    }
    assert says["general.type"] == "adapter"
    assert says["adapter.type"] == "lora"


def test_a_scale_in_nats_is_right_near_neutral_and_as_wrong_as_it_says(tmp_path: Path) -> None:
    found = planted("llama")
    last, vector = on_disk(found, tmp_path / "model"), tmp_path / "v.gguf"
    low, high = found.profile.reach("entropy")
    first = export(Steering(entropy=0.5 * high), found.profile, last, control_vector=vector, scale_per_nat=True)
    per_nat = read(vector)[1]["direction.1"]
    assert first.options.startswith(f"--control-vector-scaled {vector}:{0.5 * high:g} ")
    # Whatever the steering asks for, the file is the same.
    export(Steering(entropy=0.2 * low), found.profile, last, control_vector=vector, scale_per_nat=True)
    torch.testing.assert_close(read(vector)[1]["direction.1"], per_nat)
    # The length of what is written says which position of the dial a scale is.
    asked = 0.5 * high
    export(Steering(entropy=asked), found.profile, last, control_vector=vector)
    per_position = read(vector)[1]["direction.1"].norm() / found.profile.dial_position("entropy", asked)
    curve = found.profile.response["entropy"]
    listed = readings(found.profile, "entropy")
    assert {low, high} == {listed[0].scale, listed[-1].scale}
    for scale, change in listed:
        position = scale * float(per_nat.norm() / per_position)
        if change is not None:
            assert change == pytest.approx(np.interp(position, curve.position, curve.change("entropy")), abs=1e-6)
        else:
            assert not curve.position[0] <= position <= curve.position[-1]
    # A tenth of a percent of the reach is near.
    near = found.profile.dial_position("entropy", 1e-3 * high)
    assert 1e-3 * high * float(per_nat.norm() / per_position) == pytest.approx(near, rel=0.2)


@pytest.mark.parametrize(
    ("steering", "kinds", "sentence"),
    [
        ("clamp.5=0:1", FILE_NAMES, "a range is not linear"),
        ("entropy=0.1 positions=generated", FILE_NAMES, "the same at all positions"),
        ("neutral", FILE_NAMES, "changes nothing"),
        ("scale.5=1", FILE_NAMES, "changes nothing"),
        ("scale.5=0", ("lora",), "adds a constant; say where that goes with --to control-vector FILE.gguf"),
        ("scale.5=0", ("control-vector",), "multiplies activations; say where that goes with --to lora FILE.gguf"),
        ("entropy=0.1", FILE_NAMES, "nothing in it multiplies activations; leave out --to lora"),
        ("clamp.5=0", FILE_NAMES, "nothing in it adds a constant; leave out --to control-vector"),
        ("entropy=99", FILE_NAMES, "out of reach"),
    ],
)
def test_what_no_file_can_hold_is_refused(steering: str, kinds: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    found = planted("llama")
    last = on_disk(found, tmp_path / "model")
    with pytest.raises(SteeringError, match=re.escape(sentence)):
        export(Steering.parse(steering), found.profile, last, **files_in(tmp_path, kinds))
    assert not list(tmp_path.glob("*.gguf"))


def test_other_refusals(tmp_path: Path) -> None:
    llama = planted("llama")
    last, steering = on_disk(llama, tmp_path / "model"), Steering(entropy=0.1)
    with pytest.raises(ProfileMismatchError):
        export(steering, planted("gpt2").profile, last, control_vector=tmp_path / "v.gguf")
    unknown = last._replace(config=SimpleNamespace(model_type="gpt_neo"))
    with pytest.raises(UnsupportedModelError, match=r"gpt_neo: llama\.cpp's name for this kind of model is not known"):
        export(steering, llama.profile, unknown, control_vector=tmp_path / "v.gguf")
    with pytest.raises(SteeringError, match="commas and colons"):
        export(steering, llama.profile, last, control_vector=tmp_path / "a,b.gguf")
    for asked in (Steering(entropy=0.1, unigram=0.1), Steering(shift={5: 1.0})):
        with pytest.raises(SteeringError, match="one dial alone"):
            export(asked, llama.profile, last, control_vector=tmp_path / "v.gguf", scale_per_nat=True)


def test_a_ladder_is_even_and_names_its_steps() -> None:
    steps = ladder("entropy=-0.5:1:4", Steering(unigram=0.1))
    assert steps == {
        "entropy-0.500": Steering(entropy=-0.5, unigram=0.1),
        "entropy+0.500": Steering(entropy=0.5, unigram=0.1),
        "entropy+1.000": Steering(entropy=1.0, unigram=0.1),
    }
    for wrong in ("entropy=1:0:3", "entropy=0:1:1", "entropy=0:1", "entropy=0:1:1000", "scale=0:1:3", "entropy=0:0.001:9"):
        with pytest.raises(SteeringError):
            ladder(wrong, Steering())
    with pytest.raises(SteeringError, match="leave it out"):
        ladder("entropy=0:1:3", Steering(entropy=0.1))


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["export", *(str(a) for a in arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_reads_a_gguf_file_and_says_how_to_use_what_it_writes(tmp_path: Path) -> None:
    """The file's own last layer, whatever precision it is in: the profile is of that."""
    found = planted("llama")
    model = gguf_files.write(tmp_path / "model.gguf", found.model)
    found.profile.save(tmp_path / "profile")
    vector, lora = tmp_path / "v.gguf", tmp_path / "l.gguf"
    asked = (model, "-p", tmp_path / "profile", "-s", "scale.5=0")
    result = run(*asked, "--to", "lora", lora, "--to", "control-vector", vector)
    line = next(line for line in result.output.splitlines() if "llama-server" in line)
    expected = ["llama-server", "-m", model, "--lora", lora, "--control-vector", vector, "--control-vector-layer-range", 1, 1]
    assert shlex.split(line) == [str(word) for word in expected]
    given = as_llama_cpp_does(found.model, vector, lora, layer=1)
    with confsteer.steer(found.model, found.profile, "scale.5=0"):
        torch.testing.assert_close(given, log_probabilities(found.model), atol=1e-5, rtol=0)

    result = run(*asked[:3], "--ladder", "entropy=-0.1:0.1:3", "--to", "control-vector", vector)
    assert sorted(file.name for file in tmp_path.glob("v.e*")) == ["v.entropy+0.100.gguf", "v.entropy-0.100.gguf"]
    result = run(*asked[:3], "-s", "entropy=0.1", "--scale-per-nat", "--to", "control-vector", vector)
    assert f"--control-vector-scaled {vector}:0.1" in result.output
    assert "read as nats of entropy" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "control-vector", "v.gguf"], "give --steer once"),
        (["-s", "entropy=0.1", "-s", "entropy=0.2", "--to", "control-vector", "v.gguf"], "give --steer once"),
        (["-s", "entropy=0.1", "--to", "lora", "v.gguf", "--to", "lora", "w.gguf"], "give --to once"),
        (["--ladder", "entropy=0:1:3", "--to", "lora", "v.gguf"], "--ladder goes with --to control-vector"),
        (["-s", "entropy=0.1", "--to", "onnx", "v.gguf"], "'onnx' is not one of"),
        (["-s", "entropy=0.1", "--to", "control-vector", "v.gguf", "--text", "t.txt"], "--text is for models with a norm"),
        (["-s", "entropy=0.1", "--scale-per-nat", "--to", "control-vector", "v.gguf", "--text", "t.txt"], "leave out one"),
    ],
)
def test_wrong_usage(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in run("-p", "confsteer-demo", *arguments, code=2).output


def test_an_error_that_is_expected_is_one_sentence(tmp_path: Path) -> None:
    result = run("-p", "confsteer-demo", "-s", "clamp.5=0:1", "--to", "lora", tmp_path / "l.gguf", code=1)
    assert result.output.startswith("Error: ")
