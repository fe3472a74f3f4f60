"""The commands on a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import confsteer
from confsteer import Profile, Steering
from confsteer.evaluation.evaluate import Evaluation
from confsteer.text.windows import make_windows
from tests.mixtures import planted_experts
from tests.planted import output_weights
from tests.test_cli import run


def test_a_mixture_of_experts_is_scanned_calibrated_shown_and_steered(tmp_path: Path) -> None:
    found = planted_experts("qwen2_moe")
    found.model.save_pretrained(tmp_path / "model")
    found.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(found.texts))
    scanned = run("scan", tmp_path / "model", "--out", tmp_path / "scan", "--plot", tmp_path / "scan.png").output
    assert "112 neurons (4 experts of 24 neurons and a shared one of 16), scanned" in " ".join(scanned.split())
    assert "1.shared.7" in scanned
    text = ("--text", tmp_path / "text.txt", "--window", 64)
    made = run("calibrate", tmp_path / "model", *text, "--scan", tmp_path / "scan", "--out", tmp_path / "p").output
    assert "1.shared.7" in made
    assert "1.1.5" in made
    profile = Profile.load(tmp_path / "p")
    assert profile.columns["active"][29] == profile.steerable[1].active
    pictures = ("--plot", tmp_path / "neurons.svg", "--response", tmp_path / "dials.png")
    shown = run("show", tmp_path / "p", "--near", *pictures).output
    assert "active on the tokens that the router sends" in " ".join(shown.split())
    assert (tmp_path / "neurons.svg").stat().st_size > 0
    steering = ("--steer", "entropy=0.05", "--steer", "scale.1.5=0")
    evaluated = run("eval", tmp_path / "model", "--profile", tmp_path / "p", *text, *steering).output
    assert "scale.1.5=0" in evaluated
    few = ("--profile", tmp_path / "p", "--max-new-tokens", 3, "--steer", "scale.shared.7=0.5")
    assert "scale.shared.7=0.5" in run("generate", "t1 t2 t3", tmp_path / "model", *few).output
    refused = run("study", "induction", tmp_path / "model", "--profile", tmp_path / "p", "--half", 20, code=1).output
    assert "needs neurons that are active on every token" in " ".join(refused.split())


def test_a_mixture_tuned_by_command_is_steered_as_its_evaluation_says(tmp_path: Path) -> None:
    found = planted_experts("gpt_oss")
    routed = found.profile.steerable[0].key
    texts = output_weights(Steering(scale={routed: -1.0}, shift={routed: 0.8}), documents=40, found=found)
    found.save(tmp_path)
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    given = (tmp_path / "model", "--profile", tmp_path / "profile", "--text", tmp_path / "text.jsonl", "--window", 64)
    run("tune", *given)
    run("tune", *given, "--dials", "--name", "dials")
    run("eval", *given, "--steer", "preset=calibrated", "--steer", "preset=dials", "--json", tmp_path / "eval.json")
    (result,) = Evaluation.model_validate_json((tmp_path / "eval.json").read_bytes()).texts
    profile = Profile.load(tmp_path / "profile")
    assert set(profile.presets["calibrated"].scale) == {neuron.key for neuron in found.profile.steerable}
    (batch,) = make_windows(texts, found.tokenizer, window=64).batches(len(texts))
    losses = []
    for name, row in zip(("calibrated", "dials"), result.of_kind("steering"), strict=True):
        with torch.no_grad(), confsteer.steer(found.model, profile, preset=name):
            logits = found.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[batch.kept]
        losses.append(float(torch.nn.functional.cross_entropy(logits, batch.targets)))
        assert row.metrics["loss"].value == pytest.approx(losses[-1], abs=1e-5)
        assert row.minus["neutral"]["loss"].high < 0
    assert losses[0] < losses[1], "gains of each neuron can say what the text was written with; dials cannot"
