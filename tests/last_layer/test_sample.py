"""One pass for all interventions, and the sample of the vocabulary, against the definition of the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import confsteer.last_layer.sample
from confsteer.evaluation.fit import _descend, fit_null_write, fit_temperature, match_entropy
from confsteer.last_layer.coordinates import Coordinates
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.readout import NormParameters, Readout
from confsteer.last_layer.scores import TokenScores, largest
from confsteer.last_layer.states import TokenStates
from confsteer.last_layer.text_states import TextStates
from confsteer.last_layer.unigram import Unigram

NEURONS, WIDTH, TOKENS = 3, 24, 60


def random_text(
    vocab: int = 300,
    *,
    centred: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    write_norm: bool = False,
    tokens: int = TOKENS,
) -> TextStates:
    """Random states in front of a random last layer, with logits as spread as a language model's."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    norm = NormParameters(1 + 0.1 * random(WIDTH), random(WIDTH) if bias else None, 1e-5, centred)
    readout = Readout.fold(
        w_out=random(NEURONS, WIDTH),
        unembedding=2.5 * WIDTH**-0.5 * random(vocab, WIDTH),
        norm=norm,
        unembedding_bias=0.5 * random(vocab) if bias else None,
        softcap=softcap,
        write_norm=norm._replace(centred=False, bias=None) if write_norm else None,
    )
    states = TokenStates(
        random(tokens, NEURONS),
        4 * random(tokens, WIDTH) + random(WIDTH),
        3 * random(tokens, WIDTH) if write_norm else None,
        torch.randint(0, vocab, (tokens,), generator=generator),
        torch.zeros(tokens, dtype=torch.long),
    )
    return TextStates(readout, states, torch.nn.functional.normalize(random(WIDTH), dim=0))


LAYERS: dict[str, Callable[[int], TextStates]] = {
    "rms": random_text,
    "layer norm and biases": lambda vocab: random_text(vocab, centred=True, bias=True),
    "softcap and biases": lambda vocab: random_text(vocab, bias=True, softcap=6.0),
    "write norm": lambda vocab: random_text(vocab, write_norm=True),
    "all": lambda vocab: random_text(vocab, centred=True, bias=True, softcap=6.0, write_norm=True),
}


def interventions() -> list[Intervention]:
    neutral = Intervention.neutral(NEURONS)
    steering = neutral._replace(
        gain=torch.tensor([-2.0, 1.0, 0.5]), bias=torch.tensor([0.3, 0.0, 1.0]), high=torch.full((3,), 1.5)
    )
    one_neuron = neutral._replace(bias=torch.tensor([0.0, 2.0, 0.0]))
    hot, constant = torch.tensor(1.7), torch.tensor(-3.0)
    return [
        neutral,
        steering,
        one_neuron,
        neutral._replace(temperature=hot),
        neutral._replace(null_write=constant),
        steering._replace(temperature=hot, null_write=constant),
    ]


def by_definition(text: TextStates, intervention: Intervention) -> Tensor:
    return text.logits(intervention).double()


@pytest.mark.parametrize("layer", LAYERS)
def test_one_pass_gives_what_each_intervention_gives_by_itself(layer: str) -> None:
    text = LAYERS[layer](300)
    wanted, unigram = interventions(), Unigram.from_counts(torch.arange(300))
    done: list[int] = []
    found = text.predict([text.coordinates(one) for one in wanted], unigram, on_tokens=done.append)
    assert sum(done) == text.tokens
    q = unigram.log_frequency.double().exp()
    for one, predictions in zip(wanted, found, strict=True):
        logits = by_definition(text, one)
        expected = TokenScores.of(logits, text.states.targets)
        for ours, theirs in zip(predictions.scores, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-5, rtol=2e-5)
        p = logits.softmax(dim=-1)
        divergences = predictions.divergences
        torch.testing.assert_close(divergences.kl_model_unigram.double(), (p * (p / q).log()).sum(-1), atol=2e-5, rtol=0)
        torch.testing.assert_close(divergences.kl_unigram_model.double(), (q * (q / p).log()).sum(-1), atol=2e-5, rtol=0)


def test_each_fold_has_its_own_intervention() -> None:
    text = random_text()
    one, other = interventions()[3], interventions()[3]._replace(temperature=torch.tensor(0.8))
    even, odd = torch.arange(0, TOKENS, 2), torch.arange(1, TOKENS, 2)
    parts = [text.at(even).coordinates(one), text.at(odd).coordinates(other)]
    (found,) = text.predict([Coordinates.join(parts, torch.cat([even, odd]).argsort())])
    for rows, intervention in ((even, one), (odd, other)):
        torch.testing.assert_close(found.scores.nll[rows], text.scores(intervention).nll[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_vocabulary_no_larger_than_the_sample_is_taken_whole(layer: str) -> None:
    text = LAYERS[layer](300)
    for one in interventions():
        expected = TokenScores.of(by_definition(text, one), text.states.targets)
        for ours, theirs in zip(text.sampled_scores(one), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_of_the_unsteered_output_the_sample_has_sum_and_mean_exactly(layer: str) -> None:
    text = LAYERS[layer](5_000)
    neutral = Intervention.neutral(NEURONS)
    logits = by_definition(text, neutral)
    assert text.sample.ids.shape[1] < 1_100
    (part,) = text.sampled(text.coordinates(neutral))
    p = (part.logits + part.log_weight).softmax(dim=-1)
    torch.testing.assert_close(part.log_sum.double(), logits.logsumexp(-1), atol=1e-5, rtol=0)
    expected = (logits.softmax(-1) * logits).sum(-1)
    torch.testing.assert_close((p * part.logits).sum(-1).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(part.of_target.double(), logits.gather(1, text.states.targets[:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_writes_are_looked_up_or_multiplied(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = LAYERS[layer](2_000)
    for one in interventions():
        multiplied = text.sampled_scores(one)
        with monkeypatch.context() as patch:
            patch.setattr(confsteer.last_layer.sample, "MULTIPLIED", 0)
            looked_up = text.sampled_scores(one)
        for ours, theirs in zip(multiplied, looked_up, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_steered_losses_and_entropies_of_the_sample(layer: str) -> None:
    """They are right on average: the errors of tokens are small and their mean is no larger than chance explains."""
    text = LAYERS[layer](5_000)
    for one in interventions():
        expected = TokenScores.of(by_definition(text, one), text.states.targets)
        found = text.sampled_scores(one)
        for ours, theirs in ((found.nll, expected.nll), (found.entropy, expected.entropy)):
            error = (ours - theirs).double()
            assert float(error.std()) < 0.05
            assert abs(float(error.mean())) < 4 * float(error.std()) / TOKENS**0.5 + 1e-5


def bisected(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return middle


def likely_text() -> TextStates:
    """A text that follows its model, which has a null direction, at a temperature of 1.2."""
    text = random_text(5_000, tokens=400)
    text.readout.unembedding[:, 0] = 0
    p = (text.logits(Intervention.neutral(NEURONS)) / 1.2).softmax(dim=-1)
    targets = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    return TextStates(text.readout, text.states._replace(targets=targets), torch.eye(WIDTH)[0])


def test_fitted_temperatures_are_those_of_the_whole_vocabulary() -> None:
    """To 1e-4, and to 1e-3 where much is drawn: the sample has a fifth of the vocabulary. The loss there is right to 1e-5."""
    text = likely_text()
    neutral = Intervention.neutral(NEURONS)
    z, targets = by_definition(text, neutral), text.states.targets[:, None]

    def loss_and_entropy(temperature: float) -> tuple[float, float]:
        scores = TokenScores.of(z / temperature, targets[:, 0])
        return float(scores.nll.double().mean()), float(scores.entropy.double().mean())

    def too_hot(temperature: float) -> float:
        return float(((z / temperature).softmax(-1) * z).sum(-1).mean() - z.gather(1, targets).mean()) * -1

    found = float(fit_temperature([text]).temperature)
    expected = bisected(too_hot, 0.5, 2.0)
    assert expected == pytest.approx(1.2, abs=0.05)
    assert found == pytest.approx(expected, abs=1e-4)
    assert loss_and_entropy(found)[0] == pytest.approx(loss_and_entropy(expected)[0], abs=1e-5)
    temperatures = (0.5, 0.8, 0.95, 1.1, 1.5)
    *near, hot = match_entropy(text, [loss_and_entropy(one)[1] for one in temperatures])
    assert [float(one.temperature) for one in near] == pytest.approx(temperatures[:-1], abs=1e-4)
    assert float(hot.temperature) == pytest.approx(temperatures[-1], abs=1e-3)


def test_a_fitted_constant_is_the_best_on_the_whole_vocabulary() -> None:
    text = likely_text()
    found = fit_null_write([text])

    def loss(factor: float) -> float:
        moved = found._replace(null_write=factor * found.null_write)
        return float(TokenScores.of(by_definition(text, moved), text.states.targets).nll.double().mean())

    assert abs(float(found.null_write)) > 1
    assert all(loss(1.0) < loss(factor) + 1e-5 for factor in (0.9, 0.99, 1.01, 1.1))
    assert loss(1.0) < loss(0.5) - 1e-4


def test_a_long_text_has_a_small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confsteer.last_layer.sample, "MAX_ENTRIES", 200 * TOKENS)
    assert random_text(5_000).sample.ids.shape == (TOKENS, 201)
    monkeypatch.setattr(confsteer.last_layer.sample, "MAX_ENTRIES", 1)
    assert random_text(5_000).sample.ids.shape == (TOKENS, 2 * confsteer.last_layer.sample.MIN_OF_EACH + 1)


def test_a_certain_prediction_leaves_nothing_to_draw() -> None:
    text = random_text(5_000)
    peaked = dataclasses.replace(text.readout, unembedding=100 * text.readout.unembedding)
    sure = TextStates(peaked, text.states, text.null_direction)
    found = sure.sampled_scores(Intervention.neutral(NEURONS))
    expected = TokenScores.of(by_definition(sure, Intervention.neutral(NEURONS)), sure.states.targets)
    torch.testing.assert_close(found.nll, expected.nll, atol=1e-3, rtol=1e-5)
    assert torch.equal(found.prediction, expected.prediction)


@pytest.mark.parametrize("vocab", [50, 64 * 64, 64 * 64 + 1, 5_000])
def test_the_largest_and_where_it_is(vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Of few values, so that there are ties.
    logits = torch.randint(0, 50 * vocab, (40, vocab), generator=generator).float()
    logits[:10] = (logits[:10] / vocab).floor()
    logits[0, -1] = logits[1, 0] = 1e9
    top, index = largest(logits)
    assert torch.equal(top, logits.amax(dim=-1))
    assert index.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_a_descent_ends_in_the_valley_that_it_starts_above() -> None:
    def two_valleys(at: float) -> tuple[Tensor, Tensor]:
        """(x² − 4)² + x, with its minima near −2 and 2."""
        return torch.tensor((at**2 - 4) ** 2 + at), torch.tensor(4 * at * (at**2 - 4) + 1)

    for start, expected in ((-0.3, -2.0302), (0.3, 1.9671), (-9.0, -2.0302), (5.0, 1.9671)):
        value, at = _descend(two_valleys, start)
        assert at == pytest.approx(expected, abs=2e-3)
        assert value == pytest.approx((at**2 - 4) ** 2 + at)
