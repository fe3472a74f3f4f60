from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import confsteer
from confsteer import CorpusError, NoNeuronsError, ProfileMismatchError, SettingError
from confsteer.model.dissect import dissect
from confsteer.steering import DIALS, Dial
from confsteer.text.windows import make_windows
from tests.models import (
    ENTROPY_NEURONS,
    FREQUENCY_NEURON,
    FREQUENCY_SIGN,
    TinyFamily,
    planted_model,
    tiny_model,
    tiny_tokenizer,
    zipf_texts,
)
from tests.models import FAMILIES as TINY_FAMILIES
from tests.paths import STORIES, STORIES_TEXT
from tests.planted import Planted, planted


@pytest.fixture(params=["gpt2", "llama", "gemma2", "olmo2"])
def found(request: pytest.FixtureRequest) -> Planted:
    return planted(request.param)


@pytest.mark.parametrize("family", TINY_FAMILIES, ids=lambda family: family.model_type)
def test_exactly_the_planted_neurons_are_found(family: TinyFamily) -> None:
    profile = planted(family.model_type).profile
    assert {n.index: n.sign for n in profile.entropy_neurons} == ENTROPY_NEURONS
    assert {n.index: n.sign for n in profile.frequency_neurons} == {FREQUENCY_NEURON: FREQUENCY_SIGN}


def test_planted_neurons_have_the_statistics_they_were_given(found: Planted) -> None:
    write_norm = dissect(found.model).write_norm is not None
    for neuron in found.profile.entropy_neurons:
        assert neuron.null_fraction == pytest.approx(1, abs=1e-6)
        assert neuron.norm == pytest.approx(8, rel=1e-5)  # 4 · ‖(1, −1, 1, −1)‖
        if write_norm:  # there a neuron also turns down what the others write
            assert 0.3 < neuron.mediation.value < 1
        else:
            assert neuron.direct_effect.value == pytest.approx(0, abs=1e-7)
            assert neuron.mediation.value == pytest.approx(1, abs=1e-5)
    (frequency,) = found.profile.frequency_neurons
    assert frequency.frequency_cosine == pytest.approx(-1, abs=1e-6)
    assert frequency.frequency_mediation.value > 0.6


def test_a_softcap_has_effects_before_and_after(found: Planted) -> None:
    capped = found.model.config.model_type == "gemma2"
    for neuron in (*found.profile.entropy_neurons, *found.profile.frequency_neurons):
        assert (neuron.total_effect_uncapped is not None) == capped
        if neuron.entropy_effect_abs_uncapped is not None:
            assert neuron.entropy_effect_abs_uncapped.value != neuron.entropy_effect_abs.value


def test_columns_hold_the_whole_layer(found: Planted) -> None:
    profile = found.profile
    for name in ("norm", "logit_variance", "null_fraction", "mean_activation", "total", "mediation", "entropy_slope"):
        assert profile.columns[name].shape == (profile.model.n_neurons,)
        assert torch.isfinite(profile.columns[name]).all(), name
    for neuron in profile.entropy_neurons:
        assert profile.columns["norm"][neuron.index] == pytest.approx(neuron.norm)
        assert profile.columns["entropy_abs"][neuron.index] == pytest.approx(neuron.entropy_effect_abs.value, rel=1e-3)


def test_response_curves_pass_through_the_unsteered_model(found: Planted) -> None:
    for curve in found.profile.response.values():
        assert curve.entropy[curve.zero] == pytest.approx(found.profile.layer.entropy, rel=1e-6)
        assert curve.loss[curve.zero] == pytest.approx(found.profile.layer.loss, rel=1e-6)
        assert curve.argmax_changed[curve.zero] == 0


def test_a_sample_decides_what_is_looked_at_and_all_tokens_what_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted("llama")
    monkeypatch.setattr("confsteer.calibration.calibrate.SAMPLE_TOKENS", 600)
    sampled = confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, source="zipf")
    assert sampled.layer == found.profile.layer
    assert sampled.entropy_neurons == found.profile.entropy_neurons
    assert sampled.frequency_neurons == found.profile.frequency_neurons
    assert found.profile.corpus is not None
    planted_neurons = [*ENTROPY_NEURONS, FREQUENCY_NEURON]
    on_all = sampled.columns["effect_tokens"] == found.profile.corpus.kept_tokens
    assert on_all[planted_neurons].all()
    assert not on_all.all()
    assert sampled.columns["effect_tokens"].unique().numel() == 2
    for name in ("total", "mediation", "entropy_abs", "entropy_slope", "entropy_abs_standard_error"):
        ours, on_text = sampled.columns[name], found.profile.columns[name]
        assert torch.equal(ours[planted_neurons], on_text[planted_neurons])
        assert (ours[~on_all] != on_text[~on_all]).all()
    for dial, curve in found.profile.response.items():
        low, high = found.profile.reach(dial)
        assert sampled.response[dial].entropy != curve.entropy
        for change in (0.5 * low, 0.5 * high):
            assert sampled.dial_position(dial, change) == pytest.approx(found.profile.dial_position(dial, change), rel=0.1)


def test_effects_of_all_neurons_are_of_every_so_manyth_token_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted("llama")
    assert found.profile.corpus is not None
    tokens = found.profile.corpus.kept_tokens
    monkeypatch.setattr("confsteer.calibration.stages.EFFECT_TOKENS", tokens // 3)
    sampled = confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, source="zipf")
    counts = sampled.columns["effect_tokens"]
    assert {int(count) for count in counts.unique()} == {-(-tokens // 3), tokens}
    assert sampled.entropy_neurons == found.profile.entropy_neurons
    assert sampled.response == found.profile.response  # which is of the whole sample


@pytest.mark.parametrize("dial", DIALS)
def test_a_dial_does_what_it_was_asked_when_the_model_runs(found: Planted, dial: Dial) -> None:
    """On the calibration text itself the only error is interpolation: within 3 % of the change asked for."""

    model, tokenizer, texts, profile = found
    windows = make_windows(texts, tokenizer, window=64)
    counts = windows.counts(profile.model.tokenizer_size).double() + 1
    log_frequency = (counts / counts.sum()).log()

    def measure() -> float:
        entropy, kl, n = 0.0, 0.0, 0
        for batch in windows.batches(16):
            with torch.no_grad():
                log_p = model(batch.input_ids, use_cache=False).logits[batch.kept].double().log_softmax(-1)
            entropy += float(-(log_p.exp() * log_p).sum())
            kl += float((log_p.exp() * (log_p - log_frequency)).sum())
            n += len(log_p)
        return entropy / n if dial == "entropy" else -kl / n

    unsteered = measure()
    low, high = profile.reach(dial)
    with confsteer.steer(model, profile) as steerer:
        for change in (0.9 * low, 0.3 * low, 0.2 * high, 0.7 * high):
            steerer.update({dial: change})
            assert measure() - unsteered == pytest.approx(change, rel=0.03, abs=2e-3)


def test_calibration_is_deterministic(found: Planted) -> None:
    again = confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, source="zipf")
    assert again == found.profile


def test_half_precision_finds_the_same_neurons() -> None:
    found = planted("llama")
    counts = torch.ones(1)  # replaced by the weights below
    half = planted_model("llama", counts.expand(96)).to(torch.bfloat16)
    half.load_state_dict(found.model.state_dict())
    profile = confsteer.calibrate(half, found.tokenizer, found.texts, window=64)
    assert {n.index: n.sign for n in profile.entropy_neurons} == ENTROPY_NEURONS
    assert profile.model.dtype == "bfloat16"


@pytest.mark.parametrize("family", [f for f in TINY_FAMILIES if f.model_type in ("gpt2", "llama", "gpt_neox")])
def test_a_random_model_has_no_such_neurons_and_steering_says_so(family: TinyFamily) -> None:
    model, tokenizer = tiny_model(*family), tiny_tokenizer()
    profile = confsteer.calibrate(model, tokenizer, zipf_texts(), window=64)
    assert profile.entropy_neurons == ()
    with (
        pytest.raises(NoNeuronsError, match="has no entropy neurons"),
        confsteer.steer(model, profile, entropy=0.1),
    ):
        pass


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not here")
def test_stories260k_has_no_entropy_neurons() -> None:
    import json

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    profile = confsteer.calibrate(model, tokenizer, json.loads(STORIES_TEXT.read_text())[:100], tokens=10_000)
    assert profile.entropy_neurons == ()


def test_a_text_without_a_window_is_refused() -> None:
    found = planted("gpt2")
    with pytest.raises(CorpusError, match="too short"):
        confsteer.calibrate(found.model, found.tokenizer, ["t1 t2 t3"], window=64)


def test_a_window_beyond_the_context_is_refused() -> None:
    found = planted("gpt2")
    with pytest.raises(SettingError, match="context of 64"):
        confsteer.calibrate(found.model, found.tokenizer, found.texts, window=65)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    from transformers import PreTrainedTokenizerFast

    found = planted("gpt2")
    other = tiny_tokenizer()
    other.add_tokens([f"t{i}" for i in range(96, 120)])
    assert isinstance(other, PreTrainedTokenizerFast)
    with pytest.raises(CorpusError, match="do not belong together"):
        confsteer.calibrate(found.model, other, [" ".join(f"t{i}" for i in range(1, 120))], window=64)


def test_unigram_counts_may_be_given_and_are_checked() -> None:
    found = planted("gpt2")

    def calibrate(counts: Any) -> confsteer.Profile:
        return confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, unigram_counts=np.array(counts))

    own = make_windows(found.texts, found.tokenizer, window=64).counts(96).numpy()
    assert calibrate([*own, 0, 0]).frequency_neurons == found.profile.frequency_neurons
    reversed_counts = calibrate(own[::-1])
    assert reversed_counts.corpus
    assert found.profile.corpus
    assert reversed_counts.corpus.unigram_sha256 != found.profile.corpus.unigram_sha256
    assert [n.index for n in reversed_counts.frequency_neurons] != [FREQUENCY_NEURON]
    for wrong, sentence in (
        ([1, 2], "for 2 tokens; the tokenizer has 96"),
        ([*own, 5], "for 97 tokens"),
        (own * 0.5, "float64"),
        (-own, "from 0 up"),
    ):
        with pytest.raises(CorpusError, match=sentence):
            calibrate(wrong)


def test_a_text_too_short_to_rank_tokens_is_warned_of_unless_counts_are_given() -> None:
    found = planted("gpt2")
    with pytest.warns(UserWarning, match="500 tokens of text are too few to rank the tokenizer's 96.*--unigram"):
        confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, tokens=500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64)
        counts = np.ones(96, dtype=np.int64)
        counts[1:] += np.arange(95)
        confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, tokens=500, unigram_counts=counts)


def test_windows_are_taken_as_they_are() -> None:
    found = planted("gpt2")
    windows = make_windows(found.texts, found.tokenizer, window=64, source="zipf")
    assert confsteer.calibrate(found.model, found.tokenizer, windows) == found.profile


def test_calibration_leaves_no_hook() -> None:
    model = planted_model("gpt2", torch.ones(96))
    confsteer.calibrate(model, tiny_tokenizer(), zipf_texts(), window=64)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_scan_stands_in_for_the_statistics_of_the_weights(found: Planted, tmp_path: Path) -> None:
    found.model.save_pretrained(tmp_path)
    found.tokenizer.save_pretrained(tmp_path)
    scanned = confsteer.scan(str(tmp_path)).profile

    def calibrate(**settings: Any) -> confsteer.Profile:
        return confsteer.calibrate(found.model, found.tokenizer, found.texts, window=64, source="zipf", **settings)

    assert calibrate(scanned=scanned) == found.profile
    with pytest.raises(SettingError, match="null_dims=2 beside a scan"):
        calibrate(scanned=scanned, null_dims=2)
    other = planted("llama" if found.model.config.model_type != "llama" else "gpt2").profile
    with pytest.raises(ProfileMismatchError):
        calibrate(scanned=other)


def test_a_text_of_control_tokens_says_so() -> None:
    model, tokenizer, _, profile = planted("llama")
    for measure in (
        lambda: confsteer.calibrate(model, tokenizer, ["<eos> " * 100], window=64),
        lambda: confsteer.evaluate(model, tokenizer, ["<eos> " * 100], profile, [], window=64),
    ):
        with pytest.raises(CorpusError, match=r"no token counts: .*only control tokens"):
            measure()
