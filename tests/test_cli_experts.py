"""The commands on a mixture of experts."""

from __future__ import annotations

from pathlib import Path

from confsteer import Profile
from tests.mixtures import planted_experts
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
