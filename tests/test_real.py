"""A language model that others have trained: SmolLM2-135M-Instruct, as eval/fetch_model.py fetches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import confsteer
from confsteer import Profile, Steering
from confsteer.discovery.select import candidates
from confsteer.model.dissect import dissect
from confsteer.model.loading import LoadedModel, load_model
from confsteer.runtimes.generations import generations
from confsteer.studies.induction import induction
from confsteer.studies.repetition import Repetition
from confsteer.text.sources import python_docs
from confsteer.text.windows import make_windows, prompt_ids
from tests.paths import ROOT

FETCH = ROOT / "eval" / "fetch_model.py"
SMOLLM2 = json.loads((ROOT / "eval" / "real_models.json").read_text())["smollm2"]
FILE = Path(os.environ.get("CONFSTEER_REAL_MODELS", ROOT / "real-models")) / SMOLLM2["file"]
ENTROPY_NEURON = 830
QUESTION = "What is the capital of France?"


class Real(NamedTuple):
    """Scan of the file, and the model in it."""

    scan: Profile
    loaded: LoadedModel


@pytest.fixture(scope="session")
def real() -> Real:
    if not FILE.exists():
        pytest.skip(f"there is no {FILE}: python eval/fetch_model.py smollm2 fetches it")
    pytest.importorskip("gguf", reason="GGUF files are read with gguf: pip install 'confsteer[gguf]'")
    return Real(confsteer.scan(str(FILE)).profile, load_model(str(FILE), device="cpu"))


@pytest.mark.real
def test_its_weights_show_an_entropy_neuron(real: Real) -> None:
    """By weights alone 29.830 stands out of 1,536: the largest null fraction, and a small logit variance."""
    weights = real.scan.weights
    assert real.scan.model.layer == 29
    assert int(weights.null_fraction.argmax()) == ENTROPY_NEURON
    assert weights.null_fraction[ENTROPY_NEURON] > 2 * weights.chance_null_fraction
    assert ENTROPY_NEURON in candidates(weights)


@pytest.mark.real
def test_the_scan_is_of_the_model_that_is_loaded(real: Real) -> None:
    real.scan.check_model(dissect(real.loaded.model))
    assert real.loaded.model.get_output_embeddings().weight is real.loaded.model.get_input_embeddings().weight


@pytest.mark.real
def test_its_chat_template_is_given_as_the_file_writes_it(real: Real) -> None:
    tokenizer = real.loaded.tokenizer
    ids = prompt_ids(QUESTION, tokenizer)
    assert str(tokenizer.decode(ids)).endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    # One before each of three roles, and none before the template's own.
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(ids[0]) == 3


@pytest.mark.real
def test_it_is_calibrated_answers_and_is_steered(real: Real) -> None:
    """1,024 tokens say that 29.830 acts through the norm; turned up, its dial raises the entropy of other text."""
    model, tokenizer = real.loaded
    with pytest.warns(UserWarning, match="too few to rank"):
        profile = confsteer.calibrate(model, tokenizer, python_docs("calibration"), tokens=1024, window=64, scanned=real.scan)
    assert ENTROPY_NEURON in {neuron.index for neuron in profile.entropy_neurons}

    steerings = [Steering(), Steering(entropy=0.3)]
    answers = generations(model, tokenizer, profile, QUESTION, steerings, max_new_tokens=12, temperature=0)
    assert "Paris" in answers[0].text
    assert answers[1].text.strip()

    batch = next(make_windows(python_docs("held-out"), tokenizer, max_tokens=512).batches(2))
    entropies = []
    with torch.no_grad(), confsteer.steer(model, profile) as steerer:
        for steering in steerings:
            steerer.update(steering)
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[batch.kept]
            entropies.append(float(torch.special.entr(logits.softmax(-1)).sum(-1).mean()))
    assert 0.15 < entropies[1] - entropies[0] < 0.45


@pytest.mark.real
def test_it_knows_random_tokens_that_it_reads_again(real: Real) -> None:
    """No token of its chat format is among them: those count at no position, and stretches would differ in length."""
    profile = Profile.load(ROOT / "calibrations" / "smollm2-135m-instruct")
    (kind,) = induction(*real.loaded, profile, repeat=Repetition(sequences=4, half=24)).kinds
    assert kind.sequences == 4
    assert kind.second.loss.high < kind.first.loss.low - 5
    assert kind.second.entropy.value < kind.first.entropy.value


def test_a_file_with_another_hash_is_an_error(tmp_path: Path) -> None:
    (tmp_path / SMOLLM2["file"]).write_bytes(b"GGUF")
    environment = os.environ | {"CONFSTEER_REAL_MODELS": str(tmp_path)}
    ended = subprocess.run([sys.executable, FETCH, "smollm2"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"should have {SMOLLM2['sha256']}" in ended.stderr
