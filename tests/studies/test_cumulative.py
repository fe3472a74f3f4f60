from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import confsteer
from confsteer import NoNeuronsError, SettingError
from confsteer.last_layer.scores import TokenScores
from confsteer.studies.cumulative import CANDIDATES, CumulativeStudy, cumulative, draw_controls
from confsteer.text.windows import make_windows
from tests.models import ENTROPY_NEURONS, FAMILIES, tiny_model, tiny_tokenizer, zipf_texts
from tests.planted import planted

TEXTS = zipf_texts(6, 150, seed=9)


def study(model_type: str, **settings: Any) -> CumulativeStudy:
    model, tokenizer, _, profile = planted(model_type)
    return cumulative(model, make_windows(TEXTS, tokenizer, window=64), profile, **{"repeats": 3, **settings})


def scores_with_means(model_type: str, neurons: Sequence[int]) -> TokenScores:
    """The model run with a hook that puts `neurons` of the last layer at the profile's means."""
    model, tokenizer, _, profile = planted(model_type)
    projection = model.transformer.h[-1].mlp.c_proj if model_type == "gpt2" else model.model.layers[-1].mlp.down_proj

    def ablate(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        a = args[0].clone()
        for neuron in neurons:
            a[..., neuron] = float(profile.columns["mean_activation"][neuron])
        return (a,)

    handle = projection.register_forward_pre_hook(ablate)
    found = []
    with torch.no_grad():
        for batch in make_windows(TEXTS, tokenizer, window=64).batches(1):
            found.append(TokenScores.of(model(batch.input_ids, use_cache=False).logits[batch.kept], batch.targets))
    handle.remove()
    return TokenScores(*map(torch.cat, zip(*found, strict=True)))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_every_step_is_what_the_model_does_with_the_neurons_at_their_means(model_type: str) -> None:
    result = study(model_type)
    profile = planted(model_type).profile
    strongest = [neuron.index for neuron in profile.entropy_neurons]
    before = scores_with_means(model_type, [])
    assert result.tokens == len(before.nll)
    assert result.entropy.value == pytest.approx(float(before.entropy.mean()), abs=1e-5)
    assert result.loss.value == pytest.approx(float(before.nll.mean()), abs=1e-5)

    def changes(neurons: Sequence[int]) -> list[float]:
        after = scores_with_means(model_type, neurons)
        entropy, loss = after.entropy - before.entropy, after.nll - before.nll
        return [float(values.mean()) for values in (entropy, entropy.abs(), loss, loss.abs())]

    for n, step in enumerate(result.steps, start=1):
        assert step.neurons == tuple(strongest[:n])
        ours = (step.entropy.nats, step.entropy_abs, step.loss.nats, step.loss_abs)
        assert [interval.value for interval in ours] == pytest.approx(changes(strongest[:n]), abs=1e-5)
        assert all(interval.low <= interval.value <= interval.high for interval in ours)
        assert step.entropy.relative.value == pytest.approx(step.entropy.nats.value / result.entropy.value)
        draws = np.array([changes(draw[:n]) for draw in result.draws])
        spread = (step.controls.entropy, step.controls.entropy_abs, step.controls.loss, step.controls.loss_abs)
        assert [s.value for s in spread] == pytest.approx(draws.mean(axis=0).tolist(), abs=1e-5)
        assert [s.low for s in spread] == pytest.approx(draws.min(axis=0).tolist(), abs=1e-5)
        assert [s.high for s in spread] == pytest.approx(draws.max(axis=0).tolist(), abs=1e-5)


def test_one_neuron_alone_is_the_effect_that_calibration_measured() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    step = cumulative(model, make_windows(texts, tokenizer, window=64), profile, k=1, repeats=1).steps[0]
    neuron = profile.entropy_neurons[0]
    assert step.neurons == (neuron.index,)
    assert step.entropy.nats.value == pytest.approx(neuron.entropy_effect.value, abs=1e-5)
    assert step.entropy_abs.value == pytest.approx(neuron.entropy_effect_abs.value, abs=1e-5)
    assert step.loss_abs.value == pytest.approx(neuron.total_effect.value, abs=1e-5)


def test_planted_neurons_move_the_entropy_more_than_any_draw() -> None:
    for step in study("llama").steps:
        assert step.entropy_abs.low > step.controls.entropy_abs.high


def test_controls_are_other_neurons_near_in_norm() -> None:
    norm = np.sort(np.random.default_rng(0).normal(5, 1, 200)).round(6)
    neurons = [60, 100, 101]
    draws = [draw_controls(norm, neurons, np.random.default_rng(seed), excluding={99, *neurons}) for seed in range(30)]
    assert len({tuple(draw) for draw in draws}) > 20
    for draw in draws:
        assert len({*draw, 99, *neurons}) == len(draw) + 4
        for neuron, control in zip(neurons, draw, strict=True):
            nearer = (np.abs(norm - norm[neuron]) < abs(norm[control] - norm[neuron])).sum()
            assert nearer < CANDIDATES + 6


def test_controls_are_reported_with_their_norms() -> None:
    result = study("llama")
    norm = planted("llama").profile.columns["norm"].numpy()
    assert not set(ENTROPY_NEURONS) & {neuron for draw in result.draws for neuron in draw}
    assert result.steps[-1].mean_norm == pytest.approx(norm[list(ENTROPY_NEURONS)].mean())
    assert result.steps[-1].controls.mean_norm == pytest.approx(norm[np.array(result.draws)].mean())


def test_the_seed_decides_the_draws() -> None:
    assert study("llama").draws == study("llama").draws
    assert study("llama").draws != study("llama", seed=1).draws


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": 3}, "k=3: the profile has 2 entropy neurons; use 1 to 2"),
        ({"k": 0}, "k=0: the profile has 2 entropy neurons; use 1 to 2"),
        ({"repeats": 0}, "0 draws of random neurons: use at least 1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        study("llama", **settings)


def test_a_layer_without_enough_other_neurons_is_named() -> None:
    with pytest.raises(SettingError, match="2 controls are needed; the layer has 1"):
        draw_controls(np.ones(3), [0, 1], np.random.default_rng(0), excluding={0, 1})


def test_a_model_without_entropy_neurons_is_refused_with_the_sentence() -> None:
    model = tiny_model(*next(f for f in FAMILIES if f.model_type == "llama"))
    profile = confsteer.calibrate(model, tiny_tokenizer(), TEXTS, window=64)
    with pytest.raises(NoNeuronsError, match="no entropy neurons"):
        cumulative(model, make_windows(TEXTS, tiny_tokenizer(), window=64), profile)


def test_a_study_survives_json() -> None:
    result = study("gpt2")
    assert CumulativeStudy.model_validate_json(result.model_dump_json()) == result
