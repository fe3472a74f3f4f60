"""Calibration of mixtures of experts: the planted neurons, and the closed form against the model itself."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import confsteer
from confsteer import Steering
from confsteer.errors import LoadError
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.model.dissect import dissect
from confsteer.text.windows import make_windows
from tests.mixtures import FREQUENCY, MIXTURES, ROUTED_ENTROPY, SHARED_ENTROPY, planted_experts, tiny_mixture
from tests.models import tiny_tokenizer
from tests.planted import Planted


@pytest.mark.parametrize("model_type", [family.model_type for family in MIXTURES])
def test_the_planted_neurons_are_found_in_every_mixture(model_type: str) -> None:
    found = planted_experts(model_type)
    experts = dissect(found.model).experts
    assert experts is not None
    shared = f"shared.{SHARED_ENTROPY}" if experts.shared else f"3.{SHARED_ENTROPY}"
    entropy, frequency = (f"{expert}.{unit}" for expert, unit in (ROUTED_ENTROPY, FREQUENCY))
    assert {neuron.key: neuron.sign for neuron in found.profile.entropy_neurons} == {entropy: 1, shared: -1}
    assert {neuron.key: neuron.sign for neuron in found.profile.frequency_neurons} == {frequency: -1}
    for neuron in (*found.profile.entropy_neurons, *found.profile.frequency_neurons):
        assert neuron.active is not None
        assert 0 < neuron.active <= 1
        # AFMoE's random router sends every token to the first planted expert too.
        everywhere = str(neuron.key).startswith("shared") or (model_type, neuron.key) == ("afmoe", entropy)
        assert (neuron.active == 1) == everywhere


FORMS = ["afmoe", "gpt_oss", "granitemoe", "llama4_text", "qwen2_moe"]
"""A norm on the output, biases, multipliers, weights on inputs, and a gate on the shared expert."""


@torch.no_grad()
def _logits(found: Planted, steering: Steering | None) -> Tensor:
    """Logits ``[kept tokens, vocab]`` of the model itself on the text of its calibration."""
    kept = []
    for batch in make_windows(found.texts, found.tokenizer, window=64).batches(4):
        with contextlib.nullcontext() if steering is None else confsteer.steer(found.model, found.profile, steering):
            logits = found.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        kept.append(logits[batch.kept].float())
    return torch.cat(kept)


@pytest.mark.parametrize("model_type", FORMS)
def test_an_evaluation_predicts_what_the_steered_model_does(model_type: str) -> None:
    found = planted_experts(model_type)
    some = found.profile.steerable[0].key
    steering = Steering(entropy=0.02, shift={some: 0.4}, clamp={"frequency": (0.01, None)})
    reading = Reader(found.model, found.profile).read(make_windows(found.texts, found.tokenizer, window=64))
    ours = reading.logits(Intervention.of(found.profile.edit(steering)))
    theirs = _logits(found, steering)
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=2e-4, rtol=1e-3)
    by_coordinates = reading.predict([reading.coordinates(Intervention.of(found.profile.edit(steering)))])[0].scores
    p = theirs.log_softmax(-1)
    torch.testing.assert_close(by_coordinates.entropy, -(p.exp() * p).sum(-1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model_type", FORMS)
def test_effects_and_curves_are_those_of_the_model_itself(model_type: str) -> None:
    """Mean ablation of each neuron of the profile, and a dial, against the model that is steered so."""
    found = planted_experts(model_type)
    targets = torch.cat([b.targets for b in make_windows(found.texts, found.tokenizer, window=64).batches(4)])

    def measure(steering: Steering | None) -> tuple[Tensor, Tensor]:
        p = _logits(found, steering).log_softmax(-1)
        return -(p.exp() * p).sum(-1), -p.gather(1, targets[:, None])[:, 0]

    entropy, loss = measure(None)
    assert found.profile.layer.entropy == pytest.approx(float(entropy.mean()), rel=1e-4)
    for neuron in found.profile.steerable:
        assert neuron.active is not None
        steering = Steering(scale={neuron.key: 0.0})
        ablated_entropy, ablated_loss = measure(steering)
        change = (ablated_entropy - entropy).abs()
        assert neuron.entropy_effect_abs.value == pytest.approx(float(change.mean()), rel=1e-2, abs=1e-5)
        assert neuron.total_effect.value == pytest.approx(float((ablated_loss - loss).abs().mean()), rel=1e-2, abs=1e-5)
        touched = float((change > 1e-7).double().mean())
        assert touched <= neuron.active + 1e-9, "a token that is not routed to it is left alone"
    curve = found.profile.response["entropy"]
    at = curve.zero + 6
    asked = curve.change("entropy")[at]
    assert float(measure(Steering(entropy=asked))[0].mean()) == pytest.approx(curve.entropy[at], abs=2e-4)


STORED = [
    *("afmoe", "deepseek_v3", "gpt_oss", "granitemoeshared", "hy_v3", "jamba"),
    *("lfm2_moe", "llama4_text", "mixtral", "nemotron_h", "phimoe", "qwen2_moe"),
]
"""One of each way to store experts: most one by one, and merged when transformers loads them."""


@pytest.mark.parametrize("model_type", STORED)
def test_a_scan_reads_the_experts_from_disk(model_type: str, tmp_path: Path) -> None:
    model = tiny_mixture(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scan = confsteer.scan(str(tmp_path))
    anatomy = dissect(model.float())
    assert scan.profile.model.experts == anatomy.experts
    assert anatomy.matches(scan.profile.model.fingerprints)
    readout = anatomy.readout()
    torch.testing.assert_close(scan.profile.columns["norm"], readout.w_out.double().norm(dim=1), rtol=5e-3, atol=1e-6)
    n_stored = scan.bytes_read // 2
    assert n_stored >= anatomy.n_neurons * anatomy.d_model + anatomy.vocab_size * anatomy.d_model
    assert not [name for name in scan.tensors if "gate" in name or "up" in name.split(".")[-2]]


def test_a_checkpoint_without_one_of_its_experts_is_refused(tmp_path: Path) -> None:
    tiny_mixture("mixtral").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    whole = tensors.pop(name)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="3 of the 4 experts of model"):
        confsteer.scan(str(tmp_path))
    safetensors.torch.save_file(tensors | {name: whole.T.contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"w2.weight is float32 \[24, 32\] for one expert; it should be \[32, 24\]"):
        confsteer.scan(str(tmp_path))
