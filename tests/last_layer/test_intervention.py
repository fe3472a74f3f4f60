from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import confsteer
from confsteer import Profile, Steering
from confsteer.evaluation.fit import fit, fit_null_write, fit_temperature, match_entropy
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.coordinates import Writes
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.text_states import TextStates
from confsteer.last_layer.unigram import Unigram
from confsteer.model.dissect import dissect
from confsteer.text.windows import Windows, make_windows
from tests.models import VOCAB, zipf_texts
from tests.planted import planted


@functools.cache
def text(model_type: str) -> tuple[TextStates, Windows]:
    model, tokenizer, _, profile = planted(model_type)
    windows = make_windows(zipf_texts(6, 150, seed=9), tokenizer, window=64)
    return Reader(model, profile).read(windows), windows


def model_logits(model_type: str, steering: Steering) -> Tensor:
    """By running the steered model."""
    model, _, _, profile = planted(model_type)
    found = []
    with torch.no_grad(), confsteer.steer(model, profile, steering):
        for batch in text(model_type)[1].batches(1):
            found.append(model(batch.input_ids, use_cache=False).logits[batch.kept])
    return torch.cat(found)


def request(profile: Profile) -> Steering:
    """Every kind of edit at once."""
    _, high = profile.reach("entropy")
    one, *_, last = (*profile.entropy_neurons, *profile.frequency_neurons)
    return Steering(
        entropy=high / 4,
        scale={last.index: -1.5},
        shift={one.index: 0.3 * one.std_activation},
        clamp={last.index: (last.mean_activation - last.std_activation, None)},
    )


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "olmo2", "cohere"])
def test_predictions_are_those_of_the_steered_model(model_type: str) -> None:
    layer, _ = text(model_type)
    profile = planted(model_type).profile
    steering = request(profile)
    ours = layer.logits(Intervention.of(profile.edit(steering)))
    theirs = model_logits(model_type, steering)
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=0)
    unsteered = layer.logits(Intervention.neutral(layer.readout.n_neurons))
    assert float((unsteered.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()) > 0.05


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_text_with_some_of_its_neurons_is_the_same_text(model_type: str) -> None:
    """Changing some neurons is changing all of them, the others as they are; of the sample too."""
    layer, _ = text(model_type)
    layer.draw_sample()
    places = torch.tensor([2, 0])
    few = layer.of_neurons(places, Writes(layer.readout.select(places), layer.null_direction))
    some = Intervention.neutral(2)._replace(gain=torch.tensor([-1.5, 2.0]), bias=torch.tensor([0.3, -0.2]))
    every = Intervention.neutral(layer.readout.n_neurons)
    every.gain[places], every.bias[places] = some.gain, some.bias.clone()
    torch.testing.assert_close(few.logits(some), layer.logits(every), atol=1e-5, rtol=0)
    torch.testing.assert_close(few.sampled_scores(some).nll, layer.sampled_scores(every).nll, atol=1e-5, rtol=0)


def test_temperature_and_constant_by_their_definition() -> None:
    layer, _ = text("llama")
    model = planted("llama").model
    neutral = Intervention.neutral(layer.readout.n_neurons)
    logits = model_logits("llama", Steering())
    halved = layer.logits(neutral._replace(temperature=torch.tensor(2.0)))
    torch.testing.assert_close(halved.log_softmax(-1), (logits / 2).log_softmax(-1), atol=1e-4, rtol=0)
    residual = layer.states.residual + 3 * layer.null_direction
    with torch.no_grad():
        written = model.lm_head(model.model.norm(residual))
    ours = layer.logits(neutral._replace(null_write=torch.tensor(3.0)))
    torch.testing.assert_close(ours.log_softmax(-1), written.log_softmax(-1), atol=1e-4, rtol=0)


def test_the_null_direction_is_read_by_nothing() -> None:
    for model_type in ("gpt2", "llama"):
        layer, _ = text(model_type)
        assert float(layer.null_direction.norm()) == pytest.approx(1, abs=1e-5)
        unread = layer.readout.unembedding @ layer.null_direction
        assert float(unread.abs().max()) < 1e-4 * float(layer.readout.unembedding.norm(dim=1).max())


def test_scores_and_divergences_by_their_definition() -> None:
    layer, windows = text("llama")
    unigram = Unigram.from_counts(windows.counts(VOCAB))
    (found,) = layer.predict([layer.coordinates(Intervention.neutral(layer.readout.n_neurons))], unigram)
    scores, divergences = found.scores, found.divergences
    logits = model_logits("llama", Steering())
    targets = torch.cat([batch.targets for batch in windows.batches(1)])
    for ours, expected in zip(scores, TokenScores.of(logits, targets), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    p, q = logits.double().softmax(-1), unigram.log_frequency.double().exp()
    torch.testing.assert_close(divergences.kl_model_unigram.double(), (p * (p / q).log()).sum(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(divergences.kl_unigram_model.double(), (q * (q / p).log()).sum(-1), atol=1e-4, rtol=0)


def test_some_of_the_tokens() -> None:
    layer, _ = text("gemma2")
    rows = torch.tensor([3, 40, 5])
    neutral = Intervention.neutral(layer.readout.n_neurons)
    assert layer.at(rows).tokens == 3
    # One token's matrix products may be summed in another order than many tokens'.
    torch.testing.assert_close(layer.at(rows).scores(neutral).nll, layer.scores(neutral).nll[rows], atol=1e-4, rtol=0)


def test_the_model_is_left_as_it_was() -> None:
    model, tokenizer, texts, profile = planted("gpt2")
    Reader(model, profile).read(make_windows(texts, tokenizer, window=64, max_tokens=300))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert dissect(model).layer == profile.model.layer


def sharpened(temperature: float) -> TextStates:
    """A text that the planted model would have written at a temperature, so that this temperature is the one to be found."""
    layer, _ = text("llama")
    logits = layer.logits(Intervention.neutral(layer.readout.n_neurons))
    many = layer.at(torch.arange(layer.tokens).repeat(40))
    drawn = torch.multinomial((logits.repeat(40, 1) / temperature).softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    return TextStates(many.readout, many.states._replace(targets=drawn[:, 0]), many.null_direction)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_the_temperature_a_text_was_written_at_is_found(temperature: float) -> None:
    layer = sharpened(temperature)
    found = float(fit_temperature([layer]).temperature)
    assert found == pytest.approx(temperature, rel=0.02)
    # It is the minimum: a grid around it is nowhere lower.
    neutral = Intervention.neutral(layer.readout.n_neurons)
    losses = {
        t: float(layer.scores(neutral._replace(temperature=torch.tensor(t))).nll.mean())
        for t in (found, *(temperature * f for f in (0.9, 0.97, 1.03, 1.1)))
    }
    assert min(losses, key=losses.__getitem__) == found


def test_a_constant_in_the_null_space_goes_the_way_the_text_asks_for() -> None:
    """In a model with a null space a longer residual is a higher temperature."""
    neutral = Intervention.neutral(text("llama")[0].readout.n_neurons)
    for temperature in (0.9, 1.6):
        layer = sharpened(temperature)
        written = fit_null_write([layer])
        before, after = (layer.scores(one) for one in (neutral, written))
        assert float(after.nll.mean()) < float(before.nll.mean())
        assert (float(after.entropy.mean()) > float(before.entropy.mean())) == (temperature > 1)


def test_matched_temperatures_have_the_entropy_asked_for() -> None:
    layer, _ = text("llama")
    wanted = [0.5, 2.0, 3.5, 4.4]
    found = [float(layer.scores(one).entropy.mean()) for one in match_entropy(layer, wanted)]
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("objective", ["nll", "brier", "ece"])
def test_the_gradient_is_the_slope(objective: str) -> None:
    """Of the objective in each direction, by central differences; of ECE it is that of the squared gaps of its bins."""
    from confsteer.evaluation.fit import _value_and_gradient
    from confsteer.tuning.parameters import NeuronParameters

    layer, _ = text("llama")
    ways = NeuronParameters(planted("llama").profile)
    at = 0.1 * torch.randn(ways.number, generator=torch.Generator().manual_seed(1))

    def value(where: Tensor) -> float:
        return float(_value_and_gradient(ways.intervention, where, [layer], objective)[0])  # type: ignore[arg-type]

    _, gradient = _value_and_gradient(ways.intervention, at, [layer], objective)  # type: ignore[arg-type]
    for i in (0, 3, 4):
        step = torch.zeros(ways.number)
        # Small enough that no confidence moves to another bin, which the slope knows nothing about.
        step[i] = 1e-2 if objective != "ece" else 1e-3
        slope = (value(at + step) - value(at - step)) / float(2 * step[i])
        assert float(gradient[i]) == pytest.approx(slope, rel=0.1, abs=1e-5)
        assert abs(slope) > 5e-4


def test_fitting_stops_where_validation_is_best() -> None:
    """Fitted to one temperature and stopped by another, the best step is one that was taken."""
    train, validation = sharpened(1.6), sharpened(1.2)
    neutral = Intervention.neutral(train.readout.n_neurons)
    scores: list[float] = []
    found = fit(
        lambda at: neutral._replace(temperature=at[0].exp()),
        torch.zeros(1),
        [train],
        validation=[validation],
        on_step=lambda step, score: scores.append(score),
    )
    reached = float(validation.scores(found.intervention).nll.mean())
    assert reached == pytest.approx(min(scores), abs=1e-5)
    assert reached <= float(validation.scores(neutral).nll.mean())


def test_a_pull_towards_neutral_pulls() -> None:
    layer = sharpened(1.6)
    neutral = Intervention.neutral(layer.readout.n_neurons)

    def found(ridge: float) -> float:
        return float(fit(lambda at: neutral._replace(temperature=at[0].exp()), torch.zeros(1), [layer], ridge=ridge).parameters)

    assert 0 < found(10.0) < found(0.3) < found(0.0)
