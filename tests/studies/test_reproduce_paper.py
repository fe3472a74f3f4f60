"""The script that measures what the paper measures, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import confsteer
from confsteer.studies.cumulative import CumulativeStudy
from confsteer.studies.induction import InductionStudy
from confsteer.studies.repetition import Repetition, natural_cut
from confsteer.text.windows import make_windows
from tests.models import ENTROPY_NEURONS, FAMILIES, FREQUENCY_NEURON, tiny_model, tiny_tokenizer, zipf_texts
from tests.planted import planted
from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("reproduce_paper")


def run(script: ModuleType, *arguments: object) -> None:
    result = CliRunner().invoke(script.main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


def report_on(script: ModuleType, model: object, folder: Path, *more: object) -> tuple[str, dict[str, object]]:
    """Report and numbers of a model that is saved and read back, calibrated on its text."""
    model.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(zipf_texts(20, 200)))
    arguments = [folder / "model", "--text", folder / "text.txt", "--window", 64, "--tokens", 600, "--half", 24]
    run(script, *arguments, "--sequences", 4, "--out", folder / "out", *more)
    if "--measure-only" in more:
        assert [file.name for file in (folder / "out").iterdir()] == ["report.json"]
        run(script, "--profile", folder / "profile", "--draw", folder / "out" / "report.json")
    text = (folder / "out" / "report.md").read_text()
    for picture in {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}:
        assert (folder / "out" / picture).read_bytes().startswith(b"\x89PNG")
    return text, json.loads((folder / "out" / "report.json").read_text())


def test_a_report_has_every_section_and_its_numbers_can_be_read_back(script: ModuleType, tmp_path: Path) -> None:
    text, numbers = report_on(script, planted("llama").model, tmp_path)
    assert text.count("\n## ") == 10
    for index in (*ENTROPY_NEURONS, FREQUENCY_NEURON):
        assert f"| 1.{index} |" in text
    assert text.count("\n![") == 5
    assert "**This model has none, so nothing was ablated.**" in text
    assert "Skipped: the published numbers are of GPT-2 small" in text
    assert len(CumulativeStudy.model_validate(numbers["cumulative"]).steps) == len(ENTROPY_NEURONS)
    assert [kind.kind for kind in InductionStudy.model_validate(numbers["induction"]).kinds] == ["random", "natural"]


def test_tables_are_whole(script: ModuleType, tmp_path: Path) -> None:
    """Every row of a Markdown table has as many cells as its head: no bar of an absolute value has slipped in.

    The report is drawn of the numbers alone, after they were measured.
    """
    planted("llama").save(tmp_path)
    text, _ = report_on(script, planted("llama").model, tmp_path, "--profile", tmp_path / "profile", "--measure-only")
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_a_model_without_entropy_neurons_gets_a_report_that_says_so(script: ModuleType, tmp_path: Path) -> None:
    text, numbers = report_on(script, tiny_model(*next(f for f in FAMILIES if f.model_type == "llama")), tmp_path)
    assert "**No entropy neurons were found in this model.**" in text
    assert text.count("**Not measured: no entropy neurons were found in this model.**") == 3
    assert numbers["cumulative"] is None


def test_published_numbers_are_printed_beside_those_measured(script: ModuleType) -> None:
    """On a random model as wide as GPT-2 small's layer, which has none of the published neurons."""
    model = tiny_model("gpt2", {"n_embd": 64, "n_inner": 3072, "n_layer": 1, "n_head": 4, "n_positions": 64})
    texts, tokenizer = zipf_texts(4, 150), tiny_tokenizer()
    profile = confsteer.calibrate(model, tokenizer, texts, window=64)
    repeat = Repetition(sequences=4, half=24)
    window, tokens = natural_cut(tokenizer, repeat)
    natural = make_windows(texts, tokenizer, window=window, max_tokens=tokens)
    text = script.against_published(model, tokenizer, profile, natural, repeat)
    norm = float(profile.columns["norm"][584])
    assert f"| 584 | 10.94 | {norm:.4g} | 2.46e-05 |" in text
    assert "entropy neurons: 0 of the 6 named ones are found; missed: 584, 2378, 2870, 2123, 1611, 2910" in text
    assert "token-frequency neurons: 0 of the 6" in text
    assert "2378 clipped, random tokens read again" in text
    assert "arXiv 2509.10663" in text
