"""The script that compares tuned steerings with temperatures, on a planted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from confsteer import Profile, Steering
from confsteer.evaluation.evaluate import read_sample
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.model.loading import load_model
from confsteer.text.windows import make_windows
from confsteer.tuning.splits import share_out
from tests.models import ENTROPY_NEURONS, zipf_texts
from tests.planted import planted
from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("study_calibration")


def test_what_it_reports_is_what_the_steering_it_found_does(script: Any, tmp_path: Path) -> None:
    """Of neurons that are few among those that texts were read with, on a part of the text that was not fitted to."""
    planted("llama").save(tmp_path)
    (tmp_path / "texts").mkdir()
    texts = {"one": zipf_texts(24, 40), "other": zipf_texts(24, 40, seed=1)}
    for name, documents in texts.items():
        (tmp_path / "texts" / f"{name}.json").write_text(json.dumps(documents))
    arguments = [tmp_path / "model", "--profile", tmp_path / "profile", "--texts", tmp_path / "texts", "--window", 64]
    arguments += ["--fit", 150, "--stop", 100, "--device", "cpu", "--out", tmp_path / "out"]
    result = CliRunner().invoke(script.main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(record["neurons"]["entropy neurons"]) == {*ENTROPY_NEURONS}
    assert not {*record["neurons"]["random neurons"]} & {*record["neurons"]["all candidates"]}

    loaded, profile = load_model(str(tmp_path / "model")), Profile.load(tmp_path / "profile")
    for name, documents in texts.items():
        windows = make_windows(documents, loaded.tokenizer, window=64)
        *_, judged = share_out(read_sample(Reader(loaded.model, profile), windows), script.SHARES, 64, seed=0)
        assert record["texts"][name]["tokens"]["judged"] == judged.reading.tokens
        for to in script.FITTED_TO:
            rows = record["judged"][name][to]
            for way in ("neutral", "entropy dial", "entropy neurons"):
                found = record["found"][name][to].get(way, {"steering": "{}"})["steering"]
                intervention = Intervention.of(profile.edit(Steering.parse(found)))
                log_p = judged.reading.logits(intervention).log_softmax(-1)
                loss = -float(log_p.gather(1, judged.reading.states.targets[:, None]).double().mean())
                assert rows[way]["metrics"]["loss"][0] == pytest.approx(loss, abs=2e-4)
                entropy = float(torch.special.entr(log_p.exp()).sum(dim=1).double().mean())
                assert rows[way]["metrics"]["entropy"][0] == pytest.approx(entropy, abs=2e-4)
    table = (tmp_path / "out" / "table.md").read_text()
    for block in table.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
