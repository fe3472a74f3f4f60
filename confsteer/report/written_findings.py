"""Findings about answers in a model's own words, and its confidence in them, that go no further than the paired intervals."""

from __future__ import annotations

from confsteer.evaluation.comparison import ComparedRow, RowKind
from confsteer.evaluation.confidences import CONFIDENCES
from confsteer.evaluation.metrics import METRICS
from confsteer.evaluation.written import ConfidenceComparison, WrittenComparison
from confsteer.report.findings import AGAINST, Differences, Finding, ece_of, says, shortened, significant_sign

FITTED = "what is fitted to the unsteered model"
COMPARED = ("ece", "brier", "auroc")


def written_findings(compared: WrittenComparison) -> list[Finding]:
    """Answers to what a user asks; where no answer is right, or all are, only that."""
    found = [_knows(compared)]
    steered = len(compared.answers) > 1
    if steered:
        found.append(_changes(compared))
    if 0 < compared.answers[0].right < compared.questions:
        found.append(_tells_apart(compared))
        found += [one for confidence in compared.confidences if steered for one in _calibrated(confidence)]
    return found


def _knows(compared: WrittenComparison) -> Finding:
    unsteered, asked = compared.answers[0], compared.questions
    value, low, high = (METRICS["accuracy"].number(number) for number in unsteered.accuracy)
    lead = f"It is right on {unsteered.right:,} of {asked:,} questions: accuracy {value} ({low} to {high})."
    if unsteered.cut_off or unsteered.empty:
        lead += f" Answers cut off: {unsteered.cut_off:,}; with nothing to compare: {unsteered.empty:,}."
    if unsteered.mentioned:
        lead += (
            f" {unsteered.mentioned:,} more have the words of an accepted answer among others, as in a sentence: they may be "
            "right, and do not count."
        )
    if unsteered.right in (0, asked):
        answer = "To none of these questions." if unsteered.right == 0 else "To all of these questions."
        lead += (
            " Where all answers are alike, no confidence can tell right from wrong: there is no AUROC, and an ECE says only how "
            "far the confidence is from "
            f"{'zero' if unsteered.right == 0 else 'one'}."
        )
    else:
        answer = f"To {unsteered.right / asked:.0%} of these questions."
    return Finding("Does the model give the answers?", answer, lead, [])


def _changes(compared: WrittenComparison) -> Finding:
    """Say what steerings do to the answers themselves."""
    steered, asked = compared.answers[1:], compared.questions
    changed = sorted(one.changed for one in steered)
    span = f"{changed[0]:,}" if changed[0] == changed[-1] else f"{changed[0]:,} to {changed[-1]:,}"
    ways = [one.less_unsteered and significant_sign(one.less_unsteered) for one in steered]
    if not any(ways):
        of_accuracy = "accuracy: no difference beyond the interval."
    else:
        of_accuracy = f"of {len(steered)} steerings {ways.count('lower')} lower the accuracy, {ways.count('higher')} raise it."
    phrases = [
        f"{shortened(one.name, 60)}: {one.changed:,} of {asked:,} answers are others, {one.became_right:,} of them became right "
        f"and {one.became_wrong:,} wrong" + (f"; {says('accuracy', one.less_unsteered)}" if one.less_unsteered else "")
        for one in steered
    ]
    against = Differences(f"Against {AGAINST['neutral']}", phrases)
    return Finding("What does steering do to the answers?", f"It changes {span} of {asked:,}; {of_accuracy}", "", [against])


def _tells_apart(compared: WrittenComparison) -> Finding:
    """Say which of the unsteered model's confidences are higher where it is right."""
    phrases, tell, backwards = [], [], []
    for one in compared.confidences:
        label, stated, auroc = CONFIDENCES[one.confidence], one.stated(one.rows[0]), one.rows[0].metrics.get("auroc")
        few = f", stated for {stated:,} of {compared.questions:,} answers" if stated < compared.questions else ""
        if auroc is None:
            phrases.append(f"{label}: no AUROC{few}")
            continue
        value, low, high = (METRICS["auroc"].number(number) for number in auroc)
        phrases.append(f"{label}: AUROC {value} ({low} to {high}){few}")
        tell += [label] if auroc.low > 0.5 else []
        backwards += [label] if auroc.high < 0.5 else []
    answer = f"Beyond the interval: {', '.join(tell)}." if tell else "None, beyond the interval."
    if backwards:
        answer += f" Higher where it is wrong: {', '.join(backwards)}."
    return Finding("Which confidence tells right from wrong?", answer, "", [Differences("Without steering", phrases)])


def _calibrated(one: ConfidenceComparison) -> list[Finding]:
    """Say what the steering of the lowest ECE does to a confidence; nothing where it was not stated."""
    unsteered, fitted = one.rows[0], next((row for row in one.rows if row.kind == "temperature"), None)
    steerings = [row for row in one.rows if row.kind == "steering" and "ece" in row.minus.get("neutral", {})]
    if not steerings or "ece" not in unsteered.metrics:
        return []
    best = min(steerings, key=lambda row: row.metrics["ece"].value)
    lead = f"With {shortened(best.name, 120)} its ECE is {ece_of(best)}, without steering {ece_of(unsteered)}"
    lead += f", with {FITTED} {ece_of(fitted)}." if fitted and "ece" in fitted.metrics else "."
    if len(steerings) > 1:
        lead += (
            f" Of the {len(steerings)} steerings that is the lowest; picked where it is judged, it looks better than elsewhere."
        )
    kinds: tuple[tuple[RowKind, str], ...] = (("neutral", AGAINST["neutral"]), ("temperature", FITTED))
    differences = [
        Differences(f"Against {against}", [says(name, best.minus[kind][name]) for name in COMPARED if name in best.minus[kind]])
        for kind, against in kinds
        if kind in best.minus
    ]
    label = CONFIDENCES[one.confidence]
    return [Finding(f"{label}: is it better calibrated with steering?", _verdict(best), lead, differences)]


def _verdict(best: ComparedRow) -> str:
    change = best.minus["neutral"]["ece"]
    size, way = METRICS["ece"].number(abs(change.value)), significant_sign(change)
    if way is None:
        return "Not shown: no difference in ECE beyond the interval."
    if way == "higher":
        return f"No: its ECE is higher, by {size}."
    beside = best.minus.get("temperature", {}).get("ece")
    said = {"lower": "lower than with", "higher": "higher than with", None: "no difference beyond the interval from"}
    than = f"; {said[significant_sign(beside)]} {FITTED}" if beside else ""
    return f"Its ECE is lower, by {size}{than}."
