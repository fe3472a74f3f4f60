"""A GGUF file with a steering in its weights, as transformers loads it; test_llama_cpp.py runs one in llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import confsteer
from confsteer import LoadError, Profile, ResultError, Steering, SteeringError
from confsteer.cli import main
from confsteer.model.checkpoint import read_last_layer
from confsteer.model.loading import load_model
from confsteer.runtimes.llamacpp.baking import bake_file
from tests.model import gguf_files
from tests.planted import planted
from tests.runtimes.llamacpp.test_export import steerings

IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(5))


def log_probabilities(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits.log_softmax(-1)


def of_file(profile: Profile, path: Path) -> Profile:
    """The profile of a planted model as that of a file, whose weights may be quantised."""
    fingerprints = read_last_layer(str(path)).anatomy.fingerprints()
    return profile.model_copy(update={"model": profile.model.model_copy(update={"fingerprints": fingerprints})})


@pytest.mark.parametrize(("model_type", "kind"), [("llama", "F32"), ("llama", "F16"), ("llama", "Q8_0"), ("gpt2", "F32")])
def test_the_file_computes_what_steering_does(model_type: str, kind: str, tmp_path: Path) -> None:
    found, path = planted(model_type), tmp_path / "model.gguf"
    gguf_files.write(path, found.model, kind=kind)
    profile, last = of_file(found.profile, path), read_last_layer(str(path))
    model = load_model(str(path), device="cpu").model
    for i, (steering, kinds) in enumerate(steerings(found)):
        baked = bake_file(steering, profile, last, tmp_path / f"{i}.gguf")
        assert (baked.bias is not None) == ("control-vector" in kinds)
        assert (baked.weight is not None) == ("lora" in kinds)
        with confsteer.steer(model, profile, steering):
            expected = log_probabilities(model)
        if (model_type, baked.bias is not None) == ("llama", True):
            # transformers finds no place for a Llama's bias and refuses the file; read what is in it.
            with pytest.raises(LoadError, match="would compute something else"):
                load_model(str(tmp_path / f"{i}.gguf"), device="cpu")
            continue
        tolerance = 2e-3 if kind == "F16" else 1e-5
        given = log_probabilities(load_model(str(tmp_path / f"{i}.gguf"), device="cpu").model)
        torch.testing.assert_close(given, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_all_else_is_byte_for_byte_the_same(kind: str, tmp_path: Path) -> None:
    found, path = planted("llama"), tmp_path / "model.gguf"
    gguf_files.write(path, found.model, kind=kind)
    profile, last = of_file(found.profile, path), read_last_layer(str(path))
    steering = Steering(entropy=0.1, scale={5: 3.0})
    baked = bake_file(steering, profile, last, tmp_path / "new.gguf")
    assert baked.was_quantised == kind.startswith("Q")
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "new.gguf")
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents()
    assert Steering.parse(after.fields["confsteer.0.steering"].contents()) == steering
    one, other = ({t.name: t for t in reader.tensors} for reader in (before, after))
    assert other.keys() - one.keys() == {baked.bias}
    for name, tensor in one.items():
        same = tensor.tensor_type == other[name].tensor_type and np.array_equal(tensor.data, other[name].data)
        assert same == (name != baked.weight)
    # Of the weight, one column.
    w, new = (read_last_layer(str(p)).anatomy.w_out() for p in (path, tmp_path / "new.gguf"))
    changed = (w != new).any(dim=1).nonzero().flatten().tolist()
    assert changed == [5]
    torch.testing.assert_close(new[5], 3 * w[5], rtol=1e-3, atol=0)
    # The bias is the constant, by hand.
    edit = profile.edit(steering)
    neurons = [neuron.index for neuron in profile.steerable]
    torch.testing.assert_close(
        torch.from_numpy(np.array(other["blk.1.ffn_down.bias"].data)), torch.from_numpy(edit.bias) @ w[neurons]
    )


def test_a_constant_is_added_to_a_bias_that_is_there(tmp_path: Path) -> None:
    """Baking twice adds up, and the profile still fits."""
    found, path = planted("gpt2"), tmp_path / "model.gguf"
    gguf_files.write(path, found.model)
    bake_file(Steering(entropy=0.1), found.profile, read_last_layer(str(path)), tmp_path / "one.gguf")
    bake_file(Steering(shift={5: 0.2}), found.profile, read_last_layer(str(tmp_path / "one.gguf")), tmp_path / "two.gguf")
    said = gguf.GGUFReader(tmp_path / "two.gguf").fields
    assert [said[f"confsteer.{i}.steering"].contents() for i in range(2)] == ["entropy=+0.1", "shift.5=0.2"]
    with confsteer.steer(found.model, found.profile, Steering(entropy=0.1, shift={5: 0.2})):
        expected = log_probabilities(found.model)
    given = log_probabilities(load_model(str(tmp_path / "two.gguf"), device="cpu").model)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "steering", "sentence"),
    [
        ("qwen2", "entropy=0.1", "llama.cpp gives the last MLP of qwen2 no bias to hold it"),
        ("gemma2", "unigram=0.01", "has no bias before it"),
        ("llama", "clamp.5=0:1", "a range is not linear"),
        ("llama", "neutral", "changes nothing"),
    ],
)
def test_what_no_weight_can_hold_is_refused(model_type: str, steering: str, sentence: str, tmp_path: Path) -> None:
    tied = model_type == "gemma2"
    found, path = planted(model_type, tied=tied), tmp_path / "model.gguf"
    gguf_files.write(path, found.model, pieces=tied)
    with pytest.raises(SteeringError, match=re.escape(sentence)):
        bake_file(Steering.parse(steering), found.profile, read_last_layer(str(path)), tmp_path / "new.gguf")
    assert list(tmp_path.iterdir()) == [path]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bake", *(str(a) for a in arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_command_copies_a_file_and_writes_over_none(tmp_path: Path) -> None:
    found, path = planted("llama"), tmp_path / "model.gguf"
    gguf_files.write(path, found.model)
    found.profile.save(tmp_path / "profile")
    asked = (path, "-p", tmp_path / "profile", "-s", "entropy=0.1", "--out", tmp_path / "new.gguf")
    output = run(*asked).output
    assert "blk.1.ffn_down.bias. All else is byte for byte what it was." in output
    assert f"llama-server -m {tmp_path / 'new.gguf'}" in output
    assert "nothing is written over" in run(*asked, code=1).output
    assert "are for checkpoints" in run(*asked, "--dtype", "float16", code=2).output
    assert "is a checkpoint; give a folder" in run("-p", "confsteer-demo", *asked[3:], code=2).output
    with pytest.raises(ResultError, match="cannot write"):
        bake_file(Steering(entropy=0.1), found.profile, read_last_layer(str(path)), tmp_path / "none" / "new.gguf")
