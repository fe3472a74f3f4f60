"""What is said about answers, on answers whose truth is known: made-up log-likelihoods, no model."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from confsteer import Steering
from confsteer.evaluation.answers import MAX_TEMPERATURE, baselines
from confsteer.evaluation.choice_sample import ChoiceSample
from confsteer.evaluation.choices import ChoiceComparison, compare_answers, steered_and_matched
from confsteer.report.answer_findings import answer_findings, at_chance
from confsteer.report.answer_tables import fitted_in_words, temperature_in_words
from confsteer.report.findings import Finding
from confsteer.text.prompts import Asked
from confsteer.text.questions import Question

LESS_CONFIDENT = Steering(entropy=0.5)


def sample_of(gold: Tensor, letters: bool = True) -> ChoiceSample:
    """Questions with four choices, all of one token; their text is a letter, or the longer the later it comes."""
    texts = tuple("ABCD") if letters else tuple("x" * (1 + 3 * i) for i in range(4))
    questions = [Question("Which?", texts, int(answer)) for answer in gold]
    asked = [Asked(("Which?",) * 4, tuple(f" {text}" for text in texts))] * len(gold)
    reading: Any = SimpleNamespace(states=SimpleNamespace(window=torch.arange(4 * len(gold))))
    return ChoiceSample("quiz", questions, asked, reading, torch.arange(len(gold)), "questions", 0)


def drawn(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and right choices drawn as they say."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def compared(
    neutral: Tensor, gold: Tensor, steered: Tensor, steering: Steering = LESS_CONFIDENT, letters: bool = True
) -> ChoiceComparison:
    sample = sample_of(gold, letters)
    return compare_answers(sample, [*baselines(sample, neutral), *steered_and_matched(str(steering), steering, steered, neutral)])


def finding(found: list[Finding], words: str) -> Finding:
    (one,) = [one for one in found if words in one.question]
    return one


@functools.cache
def guessing() -> ChoiceComparison:
    """Confident answers that have nothing to do with what is right; steered, a little less confident."""
    logits, _ = drawn(300)
    gold = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))
    return compared(3 * logits, gold, 2.4 * logits)


def test_at_chance_there_is_nothing_to_calibrate_and_a_lower_ece_is_no_merit() -> None:
    result = guessing()
    assert at_chance(result)
    steered, fitted = result.of_kind("steering")[0], result.of_kind("temperature")[0]
    assert steered.minus["neutral"]["ece"].high < 0, "its ECE is lower beyond the interval"
    found = answer_findings(result)
    said = finding(found, "better calibrated")
    assert said.answer == "There is nothing to calibrate."
    for row in (result.rows[0], steered, fitted):
        assert f"{row.metrics['ece'].value:.4f}" in said.lead
    assert finding(found, "know the answers").answer == "That does not show: it is no better than guessing."
    assert not any("Yes" in one.answer for one in found if "dial" not in one.question)


def test_a_temperature_at_the_end_of_its_range_is_said_in_words() -> None:
    fitted = guessing().of_kind("temperature")[0]
    assert max(fitted.values) == pytest.approx(MAX_TEMPERATURE, rel=1e-3)
    assert "∞: all choices alike" in fitted_in_words(fitted)
    assert [temperature_in_words(value) for value in (0.1, 1.5, 1234.6, 1e4)] == [
        "0.1, the lowest tried",
        "1.500",
        "1,235",
        "∞: all choices alike",
    ]


def test_what_lowers_the_ece_less_than_the_temperature_is_said_so() -> None:
    logits, gold = drawn(600)
    result = compared(3 * logits, gold, 2.6 * logits)
    assert not at_chance(result)
    found = answer_findings(result)
    said = finding(found, "better calibrated")
    assert said.answer.startswith("Less than by a temperature: its ECE is lower by ")
    assert "the fitted temperature lowers it by" in said.answer
    fitted = result.of_kind("temperature")[0]
    assert fitted.values == pytest.approx((3, 3), rel=0.25)
    assert f"with the fitted temperature {fitted.metrics['ece'].value:.4f}" in said.lead
    assert finding(found, "know the answers").answer == "More often than by guessing."
    assert "they do not settle it" not in finding(found, "know the answers").lead
    # It is a temperature itself: nothing is left of a difference to the one of the same entropy.
    assert finding(found, "more than a temperature?").answer.startswith("Not shown")
    assert "0 of 600 answers" in finding(found, "cost").lead


def test_a_dial_that_works_backwards_and_the_answers_it_changes_are_said() -> None:
    logits, gold = drawn(300)
    steered = 1.3 * logits
    steered[:7] = steered[:7].roll(1, dims=1)
    found = answer_findings(compared(logits, gold, steered, Steering(entropy=1.0)))
    assert finding(found, "dial").answer == "No: 1 of 1 work backwards on these answers."
    assert "7 of 300 answers are others than without steering." in finding(found, "cost").lead
    forwards = answer_findings(compared(logits, gold, 0.7 * logits, Steering(entropy=1.0)))
    assert finding(forwards, "dial").answer.startswith("Yes, in direction.")
    assert not [one for one in answer_findings(compared(logits, gold, steered, Steering(unigram=0.1))) if "dial" in one.question]


def test_halves_that_disagree_are_said() -> None:
    logits, gold = drawn(400)
    neutral = torch.where((torch.arange(400) % 2 == 0)[:, None], logits, 5 * logits)
    result = compared(neutral, gold, neutral)
    knows, *_ = answer_findings(result)
    one, other = (temperature_in_words(value) for value in result.of_kind("temperature")[0].values)
    assert f"the temperature is {one}, to the other {other}: they do not settle it." in knows.lead


def test_what_the_length_of_choices_gains_is_said() -> None:
    """Right choices are drawn with a liking for short ones that the model does not have."""
    logits, _ = drawn(400)
    true = logits - 0.5 * torch.arange(4)
    gold = torch.multinomial(true.softmax(dim=1), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    result = compared(logits, gold, logits, letters=False)
    (length,) = result.of_kind("temperature and length")
    assert length.minus["temperature"]["loss"].high < 0
    # Of two halves each a temperature, nats a token and nats a character: three characters are half a nat.
    for temperature, _, character in (length.values[:3], length.values[3:]):
        assert temperature == pytest.approx(1, rel=0.35)
        assert character == pytest.approx(-0.5 / 3, rel=0.35)
    said = finding(answer_findings(result), "more to be had")
    assert said.answer.startswith("Yes: of ")
    assert "a character" in said.differences[0].against
    # Letters are all as long.
    assert not compared(logits, gold, logits).of_kind("temperature and length")


def test_chance_is_a_row_of_its_own() -> None:
    (chance,) = guessing().of_kind("chance")
    assert chance.metrics["accuracy"] == (0.25, 0.25, 0.25)
    assert chance.metrics["loss"].value == pytest.approx(1.3862944)
    assert "ece" not in chance.metrics
    difference = guessing().rows[0].minus["chance"]["loss"]
    assert difference.value == pytest.approx(guessing().rows[0].metrics["loss"].value - 1.3862944)
