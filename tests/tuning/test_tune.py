from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from confsteer import CorpusError, Profile, Steering
from confsteer.evaluation.evaluate import read_sample
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.results.bootstrap import Interval
from confsteer.text.windows import make_windows
from confsteer.tuning.parameters import DialParameters, NeuronParameters
from confsteer.tuning.splits import split
from confsteer.tuning.tune import Tuning, tune
from tests.models import zipf_texts
from tests.planted import Planted, output_weights, planted


@functools.cache
def tuned() -> Tuning:
    model, tokenizer, _, profile = planted("llama")
    steering = Steering(entropy=0.6)
    texts = {"one": output_weights(steering), "other": output_weights(steering, seed=1)}
    return tune(model, tokenizer, texts, profile, parameters="dials", window=64)


def test_the_steering_a_text_was_written_with_is_found() -> None:
    result = tuned()
    assert result.steering.entropy == pytest.approx(0.6, abs=0.15)
    assert result.gained
    for text in (*result.texts, *result.left_out):
        (row,) = text.of_kind("steering")
        assert row.minus["neutral"]["loss"].high < 0
    assert [text.source for text in result.left_out] == ["one", "other"]


def test_a_temperature_tuned_along_is_not_part_of_what_is_stored_or_judged() -> None:
    found = planted("llama")
    texts = output_weights(Steering(entropy=0.6))
    result = tune(found.model, found.tokenizer, texts, found.profile, parameters="dials", with_temperature=True, window=64)
    assert result.temperature is not None
    assert result.temperature != pytest.approx(1, abs=1e-3)
    windows = make_windows(texts, found.tokenizer, window=64)
    part = split(read_sample(Reader(found.model, found.profile), windows), windows, found.profile, seed=0).validation
    alone = Intervention.of(found.profile.edit(result.steering))
    together = alone._replace(temperature=torch.tensor(result.temperature))
    neutral, judged, other = (
        float(part.reading.scores(one).nll.mean()) for one in (Intervention.neutral(len(alone.gain)), alone, together)
    )
    assert result.validation.value == pytest.approx(judged - neutral, abs=1e-5)
    assert result.validation.value != pytest.approx(other - neutral, abs=1e-4)


def test_where_nothing_can_be_gained_it_says_so() -> None:
    """Text that the unsteered model wrote."""
    model, tokenizer, _, profile = planted("llama")
    result = tune(model, tokenizer, output_weights(Steering()), profile, window=64)
    assert not result.gained
    assert result.left_out == ()


def test_what_is_reported_is_what_the_stored_preset_does() -> None:
    found, result = planted("llama"), tuned()
    profile = found.profile.with_preset("calibrated", result.steering)
    windows = make_windows(output_weights(Steering(entropy=0.6)), found.tokenizer, window=64, source="one")
    test_part = split(read_sample(Reader(found.model, found.profile), windows), windows, found.profile, seed=0).test
    edit = profile.edit(Steering(preset="calibrated"))
    scores = test_part.reading.scores(Intervention.of(edit))
    (row,) = result.texts[0].of_kind("steering")
    assert row.metrics["loss"].value == pytest.approx(float(scores.nll.double().mean()), abs=1e-6)


def test_results_survive_json() -> None:
    assert Tuning.model_validate_json(tuned().model_dump_json()) == tuned()


def test_a_loss_that_chance_explains_is_no_gain() -> None:
    for interval, gained in ((Interval(-0.1, -0.2, -0.01), True), (Interval(-0.1, -0.2, 0.01), False)):
        assert tuned().model_copy(update={"validation": interval}).gained == gained


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_parameters_are_the_steering_they_become(model_type: str) -> None:
    profile = planted(model_type).profile
    generator = torch.Generator().manual_seed(0)
    for ways in (NeuronParameters(profile), DialParameters(profile)):
        at = 0.2 * torch.randn(ways.number, generator=generator)
        ours, stored = ways.intervention(at), Intervention.of(profile.edit(ways.steering(at)))
        for name in ("gain", "bias", "low", "high"):
            torch.testing.assert_close(getattr(ours, name).float(), getattr(stored, name), atol=1e-4, rtol=1e-4)
        neutral = ways.intervention(torch.zeros(ways.number))
        for name, expected in Intervention.neutral(len(profile.steerable))._asdict().items():
            torch.testing.assert_close(getattr(neutral, name).float(), expected.float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "opt", "cohere", "olmo2", "gemma2"])
def test_dials_stay_within_their_reach(model_type: str) -> None:
    """Whichever way the bounds round."""
    profile = planted(model_type).profile
    ways = DialParameters(profile)
    for far in (-1000.0, 1000.0):
        steering = ways.steering(torch.full((ways.number,), far))
        low, high = profile.reach("entropy")
        assert low <= (steering.entropy or 0) <= high
        profile.edit(steering)


def parts_of(found: Planted, texts: list[str], window: int = 64) -> list[set[int]]:
    windows = make_windows(texts, found.tokenizer, window=window)
    sample = read_sample(Reader(found.model, found.profile), windows)
    parts = split(sample, windows, found.profile, seed=0)
    assert sum(part.reading.tokens for part in parts[:4]) == sample.reading.tokens
    return [set(part.block.tolist()) for part in parts[:4]]


def test_parts_share_no_document() -> None:
    parts = parts_of(planted("llama"), zipf_texts(60, 100))
    assert set.union(*parts) == set(range(60))
    assert [len(part) for part in parts] == [30, 9, 9, 12]


def test_few_documents_are_cut_in_stretches() -> None:
    found, texts = planted("llama"), zipf_texts(2, 800)
    train, stop, validation, test = parts_of(found, texts)
    assert max(train) < min(stop) <= max(stop) < min(validation) <= max(validation) < min(test)


def test_documents_that_were_joined_are_cut_in_stretches() -> None:
    """Windows that follow each other may be of one document."""
    found = planted("llama")
    windows = make_windows(zipf_texts(50, 100), found.tokenizer, window=64, cross_documents=True)
    parts = split(read_sample(Reader(found.model, found.profile), windows), windows, found.profile, seed=0)
    assert parts.train.unit == "windows"
    ends = [(int(part.block.min()), int(part.block.max())) for part in parts[:4]]
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ends))


def test_too_little_text_is_refused() -> None:
    model, tokenizer, texts, profile = planted("llama")
    with pytest.raises(CorpusError, match="at least 20 windows of 64 tokens"):
        tune(model, tokenizer, texts, profile, tokens=900, window=64)


def test_a_profile_keeps_what_was_tuned(tmp_path: Path) -> None:
    profile = planted("llama").profile.with_preset("calibrated", tuned().steering)
    folder = profile.save(tmp_path)
    assert Profile.load(folder).presets["calibrated"] == tuned().steering
