"""Findings in words that go no further than the paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from confsteer.evaluation.comparison import ComparedRow, RowKind
from confsteer.evaluation.metrics import METRICS
from confsteer.results.bootstrap import Interval
from confsteer.tuning.tune import Tuning

JUDGED = ("loss", "ece", "brier")
"""Metrics that decide whether a steering is more than a temperature."""
LISTED = "loss, ECE and Brier score"
OBJECTIVES = {"nll": "loss", "brier": "Brier score", "ece": "ECE"}
AGAINST: dict[RowKind, str] = {
    "neutral": "the unsteered model",
    "chance": "chance",
    "temperature": "the fitted temperature",
    "matched temperature": "the temperature of the same mean entropy",
}


class Differences(NamedTuple):
    """Paired differences in words."""

    against: str
    phrases: list[str]


class Finding(NamedTuple):
    """A question that the user has, answered from the numbers."""

    question: str
    answer: str
    lead: str
    differences: list[Differences]


def significant_sign(difference: Interval) -> Literal["lower", "higher"] | None:
    """Say which way a paired difference goes, or None if its interval contains zero."""
    return "lower" if difference.high < 0 else "higher" if difference.low > 0 else None


def says(name: str, difference: Interval) -> str:
    """``ECE is lower by 0.0240 (0.0120 to 0.0360)``"""
    metric, way = METRICS[name], significant_sign(difference)
    if way is None:
        low, high = (metric.number(bound, sign=True) for bound in difference[1:])
        return f"{metric.label}: no difference beyond the interval ({low} to {high})"
    size, *bounds = (metric.number(abs(number)) for number in difference)
    low, high = reversed(bounds) if way == "lower" else bounds
    return f"{metric.label} is {way} by {size} ({low} to {high})"


def _against(row: ComparedRow, kind: RowKind, names: Sequence[str]) -> Differences:
    found = row.minus.get(kind, {})
    return Differences(f"Against {AGAINST[kind]}", [says(name, found[name]) for name in names if name in found])


def findings(rows: Sequence[ComparedRow]) -> list[Finding]:
    """Answers in words, none of which goes beyond the intervals. They are of the steering of the lowest ECE."""
    steerings = [row for row in rows if row.kind == "steering"]
    if not steerings:
        return []
    best = min(steerings, key=lambda row: row.metrics["ece"].value)
    changed = METRICS["argmax_changed"].number(best.metrics["argmax_changed"].value)
    cost = f"The top prediction is another one on {changed} of the tokens."
    return [better_calibrated(best, rows), costs(best, cost), more_than_a_temperature(best, steerings)]


def better_calibrated(best: ComparedRow, rows: Sequence[ComparedRow]) -> Finding:
    """Say what a steering does to the ECE, beside what the fitted temperature does."""
    steerings = sum(row.kind == "steering" for row in rows)
    temperature = next((row for row in rows if row.kind == "temperature"), None)
    steered, unsteered = (ece_of(row) for row in (best, rows[0]))
    lead = f"With {shortened(best.name, 120)} the ECE is {steered}, without steering {unsteered}"
    lead += f", with {AGAINST['temperature']} {ece_of(temperature)}." if temperature else "."
    if steerings > 1:
        lead += (
            f" Of the {steerings} steerings that is the lowest ECE here; picked where it is judged, it looks better than it "
            "would elsewhere."
        )
    kinds: tuple[RowKind, ...] = ("neutral", "temperature")
    return Finding(
        "Does steering make it better calibrated?",
        _calibration_answer(best, temperature),
        lead,
        [_against(best, kind, ("ece", "ece_equal_mass", "brier")) for kind in kinds if kind in best.minus],
    )


def _calibration_answer(best: ComparedRow, temperature: ComparedRow | None) -> str:
    difference = best.minus["neutral"]["ece"]
    way, size = significant_sign(difference), METRICS["ece"].number(abs(difference.value))
    its = temperature.minus["neutral"]["ece"] if temperature else None
    its_way = its and significant_sign(its)
    does = f"{AGAINST['temperature']} lowers it by {METRICS['ece'].number(abs(its.value))}" if its and its_way == "lower" else ""
    if way is None:
        return "Not shown: no difference in ECE beyond the interval" + (f", where {does}." if does else ".")
    if way == "higher":
        return f"No: its ECE is higher, by {size}" + (f", where {does}." if does else ".")
    to_temperature = best.minus.get("temperature", {}).get("ece")
    if to_temperature is None:
        return f"Yes: its ECE is lower, by {size}."
    beside = significant_sign(to_temperature)
    if beside == "higher":
        its_own = does or f"{AGAINST['temperature']} has a lower one"
        return f"Less than by a temperature: its ECE is lower by {size}; {its_own}."
    if beside == "lower":
        return f"Yes: its ECE is lower, by {size}, and lower than with {AGAINST['temperature']}."
    return f"Yes: its ECE is lower, by {size}; from {AGAINST['temperature']} no difference beyond the interval."


def ece_of(row: ComparedRow) -> str:
    """Write the ECE of a row."""
    return METRICS["ece"].number(row.metrics["ece"].value)


def costs(best: ComparedRow, changed: str) -> Finding:
    """Say in what a steering is worse than none; `changed` is how many predictions are others."""
    worse, better = significantly_worse_and_better(best.minus["neutral"], ("loss", "accuracy", "auroc"))
    answer = f"Worse {worse}." if worse else "Nothing that shows in loss, accuracy or AUROC."
    lead = f"{better[:1].upper() + better[1:]} {'are' if ' and ' in better else 'is'} better." if better else ""
    shown = _against(best, "neutral", ("loss", "accuracy", "auroc", "entropy"))
    return Finding("What does it cost?", answer, f"{lead} {changed}".strip(), [shown])


def more_than_a_temperature(best: ComparedRow, steerings: Sequence[ComparedRow]) -> Finding:
    """Compare a steering with the temperature of the same mean entropy, and with the fitted one."""
    worse, better = significantly_worse_and_better(best.minus.get("matched temperature", {}), JUDGED)
    same = AGAINST["matched temperature"]
    if "matched temperature" not in best.minus:
        answer = f"Not measured: {same} is not among the rows."
    elif better and worse:
        answer = f"In part: {same} is worse in {better} and better in {worse}."
    elif better:
        answer = f"Yes: {same} is worse in {better}, and better in none of {LISTED}."
    elif worse:
        answer = f"No: {same} is better in {worse}, and worse in none of {LISTED}."
    else:
        answer = f"Not shown: no difference beyond the interval from {same}."
    ways = [significant_sign(row.minus["matched temperature"]["loss"]) for row in steerings if "matched temperature" in row.minus]
    lead = ""
    if len(ways) > 1:
        lead = (
            f"Of all {len(ways)} steerings, {ways.count('lower')} have a lower loss than the temperature of their own mean "
            f"entropy, {ways.count('higher')} a higher one; of {ways.count(None)} the interval contains zero."
        )
    kinds: tuple[RowKind, ...] = ("matched temperature", "temperature")
    return Finding(
        "Is it more than a temperature?", answer, lead, [_against(best, kind, JUDGED) for kind in kinds if kind in best.minus]
    )


def significantly_worse_and_better(differences: dict[str, Interval], names: Sequence[str]) -> tuple[str, str]:
    """The metrics in which a row is worse, and those in which it is better, beyond the interval."""
    ways = {name: significant_sign(differences[name]) for name in names if name in differences}
    worse = [METRICS[name].label for name, way in ways.items() if way and way != METRICS[name].better]
    better = [METRICS[name].label for name, way in ways.items() if way and way == METRICS[name].better]
    return " and ".join(worse), " and ".join(better)


def tuning_finding(tuning: Tuning) -> Finding:
    value, low, high = (f"{number:+.4f}".replace("-", "−") for number in tuning.validation)
    lead = (
        f"On the validation split its {OBJECTIVES[tuning.objective]} less neutral's is {value} ({low} to {high}), "
        "the mean over texts: "
    )
    if tuning.gained:
        return Finding("Is it fit to be saved?", "Yes.", lead + "better beyond the interval.", [])
    lead += "worse." if significant_sign(tuning.validation) == "higher" else "no difference beyond the interval."
    return Finding("Is it fit to be saved?", "No, it is refused.", lead, [])


def shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
