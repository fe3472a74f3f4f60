"""Findings about answers to questions, in words that go no further than the paired intervals."""

from __future__ import annotations

from collections.abc import Sequence

from confsteer.evaluation.answers import halves_disagree
from confsteer.evaluation.choices import ChoiceComparison
from confsteer.evaluation.comparison import ComparedRow
from confsteer.evaluation.metrics import METRICS
from confsteer.report.answer_tables import fitted_in_words, temperature_in_words
from confsteer.report.findings import (
    Differences,
    Finding,
    better_calibrated,
    costs,
    ece_of,
    more_than_a_temperature,
    says,
    shortened,
    significant_sign,
)
from confsteer.results.bootstrap import Interval
from confsteer.steering import Steering
from confsteer.tuning.tune_answers import AnswerTuning


def answer_findings(compared: ChoiceComparison) -> list[Finding]:
    """Answers to what a user asks, those about steering of the steering with the lowest ECE."""
    rows = compared.rows
    steerings = [row for row in rows if row.kind == "steering"]
    found = [_knows(compared)] if compared.of_kind("chance") else []
    if not steerings:
        return found + _beyond(compared)
    best = min(steerings, key=lambda row: row.metrics["ece"].value)
    changed = _changed(best, compared.questions)
    if at_chance(compared):
        found += [_nothing_to_calibrate(best, compared), costs(best, changed)]
    else:
        found += [better_calibrated(best, rows), costs(best, changed), more_than_a_temperature(best, steerings)]
        found += _beyond(compared)
    return found + _dials(steerings)


def answer_tuning_finding(tuning: AnswerTuning) -> Finding:
    """Say whether a steering tuned on answers beats a temperature on them."""
    value, low, high = (METRICS["loss"].number(number, sign=True) for number in tuning.validation)
    lead = (
        f"On the {tuning.questions['validation']:,} questions of the validation part, the loss of answers with "
        f"{shortened(str(tuning.steering), 120)} and a temperature ({temperature_in_words(tuning.temperature)}), less that with "
        f"the temperature alone ({temperature_in_words(tuning.alone)}), is {value} ({low} to {high}), the mean over sets: "
    )
    if tuning.gained:
        return Finding("Is it more than a temperature, and fit to be saved?", "Yes.", lead + "better beyond the interval.", [])
    lead += "worse." if significant_sign(tuning.validation) == "higher" else "no difference beyond the interval."
    return Finding("Is it more than a temperature, and fit to be saved?", "No, it is refused.", lead, [])


def at_chance(compared: ChoiceComparison) -> bool:
    """Say whether nothing shows that the answers are worth more than guesses.

    Neither is the accuracy above chance beyond the interval, nor is the loss below it with the fitted temperature.
    """
    accuracy, loss = _to_chance(compared)
    return accuracy is not None and loss is not None and accuracy.low <= 0 <= loss.high


def _to_chance(compared: ChoiceComparison) -> tuple[Interval | None, Interval | None]:
    accuracy = compared.rows[0].minus.get("chance", {}).get("accuracy")
    fitted = compared.of_kind("temperature")
    return accuracy, fitted[0].minus.get("chance", {}).get("loss") if fitted else None


def _knows(compared: ChoiceComparison) -> Finding:
    neutral, (chance, *_), (fitted, *_) = compared.rows[0], compared.of_kind("chance"), compared.of_kind("temperature")
    accuracy, loss = _to_chance(compared)
    if at_chance(compared):
        answer = "That does not show: it is no better than guessing."
    elif accuracy is not None and accuracy.low > 0:
        answer = "More often than by guessing."
    else:
        answer = (
            "No more often than by guessing, but its confidence is worth something: with a temperature its loss is below chance."
        )
    number, guessed = METRICS["loss"].number, chance.metrics["accuracy"].value
    unsteered, with_it, of_chance = (number(row.metrics["loss"].value) for row in (neutral, fitted, chance))
    right, asked = neutral.metrics["accuracy"].value, compared.questions
    lead = (
        f"It is right on {round(right * asked):,} of {asked:,} questions, which is {right:.1%}; guessing "
        f"would be on {guessed:.1%}. Its loss is {unsteered}, with the fitted temperature {with_it}, of guessing {of_chance}."
    )
    if halves_disagree(fitted.values):
        one, other = (temperature_in_words(value) for value in fitted.values)
        lead += f" Fitted to one half of the questions the temperature is {one}, to the other {other}: they do not settle it."
    phrases = [f"unsteered, {says('accuracy', accuracy)}"] if accuracy else []
    phrases += [f"with the fitted temperature, {says('loss', loss)}"] if loss else []
    return Finding("Does the model know the answers?", answer, lead, [Differences("Against chance", phrases)])


def _nothing_to_calibrate(best: ComparedRow, compared: ChoiceComparison) -> Finding:
    (fitted, *_) = compared.of_kind("temperature")
    lead = (
        f"Where answers are no better than guesses, confidence is right if all choices are alike. The ECE is {ece_of(best)} with "
        f"{shortened(best.name, 120)}, {ece_of(compared.rows[0])} without steering and {ece_of(fitted)} with the fitted "
        f"temperature ({fitted_in_words(fitted)}): it says how far the confidence is from that of a guess, and no more."
    )
    return Finding("Does steering make it better calibrated?", "There is nothing to calibrate.", lead, [])


def _changed(best: ComparedRow, questions: int) -> str:
    if "argmax_changed" not in best.metrics:
        return ""
    share = best.metrics["argmax_changed"].value
    return f"{round(share * questions):,} of {questions:,} answers are others than without steering."


def _beyond(compared: ChoiceComparison) -> list[Finding]:
    """Say what a look at the length of the choices gains over a temperature."""
    rows = [row for row in compared.rows if row.kind in ("temperature and length", "scoring") and "temperature" in row.minus]
    if not rows or at_chance(compared):
        return []
    gains = [row for row in rows if significant_sign(row.minus["temperature"]["loss"]) == "lower"]
    if gains:
        have = "has" if len(gains) == 1 else "have"
        answer = f"Yes: of {len(rows)} ways that look at how long a choice is, {len(gains)} {have} a lower loss."
    else:
        answer = f"Not by the length of a choice: of {len(rows)} ways that look at it none has a lower loss."
    differences = [
        Differences(
            f"{row.name[:1].upper() + row.name[1:]} ({fitted_in_words(row)}), against the fitted temperature",
            [says(name, row.minus["temperature"][name]) for name in ("loss", "accuracy", "ece")],
        )
        for row in rows
    ]
    return [Finding("Is there more to be had than a temperature, without steering?", answer, "", differences)]


def _dials(steerings: Sequence[ComparedRow]) -> list[Finding]:
    """Say whether the entropy dial does to answers what it does to tokens."""
    phrases, backwards, along = [], 0, 0
    for row in steerings:
        asked = row.steering.entropy if row.steering else None
        if not asked or row.steering != Steering(entropy=asked):
            continue
        change = row.minus["neutral"]["entropy"]
        way = significant_sign(change)
        wanted = "higher" if asked > 0 else "lower"
        backwards, along = backwards + (way is not None and way != wanted), along + (way == wanted)
        phrases.append(f"{row.name} asks for {'less' if asked > 0 else 'more'} confidence: of answers, {says('entropy', change)}")
    if not phrases:
        return []
    if backwards:
        answer = f"No: {backwards} of {len(phrases)} work backwards on these answers."
    elif along == len(phrases):
        answer = "Yes, in direction. The size it asks for is one of tokens, not of answers."
    else:
        answer = f"That shows for {along} of {len(phrases)}."
    return [
        Finding("Does the entropy dial do to answers what it says?", answer, "", [Differences("Against no steering", phrases)])
    ]
