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


def _says(name: str, difference: Interval) -> str:
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
    return Differences(f"Against {AGAINST[kind]}", [_says(name, found[name]) for name in names if name in found])


def findings(rows: Sequence[ComparedRow]) -> list[Finding]:
    """Answers in words, none of which goes beyond the intervals. They are of the steering of the lowest ECE."""
    steerings = [row for row in rows if row.kind == "steering"]
    if not steerings:
        return []
    best = min(steerings, key=lambda row: row.metrics["ece"].value)
    return [_better_calibrated(best, rows[0], len(steerings)), _cost(best), _more_than_a_temperature(best, steerings)]


def _better_calibrated(best: ComparedRow, neutral: ComparedRow, steerings: int) -> Finding:
    steered, unsteered = (METRICS["ece"].number(row.metrics["ece"].value) for row in (best, neutral))
    lead = f"With {shortened(best.name, 120)} the ECE is {steered}, without steering {unsteered}."
    if steerings > 1:
        lead += (
            f" Of the {steerings} steerings that is the lowest ECE on this text; picked where it is judged, it looks better than "
            "it would on other text."
        )
    way = significant_sign(best.minus["neutral"]["ece"])
    answer = {"lower": "Yes: its ECE is lower.", "higher": "No: its ECE is higher.", None: "Not shown: no difference in ECE."}[
        way
    ]
    return Finding(
        "Does steering make it better calibrated?", answer, lead, [_against(best, "neutral", ("ece", "ece_equal_mass", "brier"))]
    )


def _cost(best: ComparedRow) -> Finding:
    worse, better = significantly_worse_and_better(best.minus["neutral"], ("loss", "accuracy", "auroc"))
    answer = f"Worse {worse}." if worse else "Nothing that shows in loss, accuracy or AUROC."
    lead = f"{better[:1].upper() + better[1:]} {'are' if ' and ' in better else 'is'} better." if better else ""
    if "argmax_changed" in best.metrics:
        changed = METRICS["argmax_changed"].number(best.metrics["argmax_changed"].value)
        lead += f" The top prediction is another one on {changed} of the tokens."
    return Finding("What does it cost?", answer, lead, [_against(best, "neutral", ("loss", "accuracy", "auroc", "entropy"))])


def _more_than_a_temperature(best: ComparedRow, steerings: Sequence[ComparedRow]) -> Finding:
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
