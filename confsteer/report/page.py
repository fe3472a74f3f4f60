"""An evaluation or a tuning as one HTML file: no script, no request to anywhere, nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from confsteer.errors import ProfileMismatchError
from confsteer.evaluation.choices import ChoiceComparison
from confsteer.evaluation.comparison import ComparedRow, RowKind, TextComparison
from confsteer.evaluation.confidences import CONFIDENCES, PromptName
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.metrics import BINS, MASS_BINS, METRICS, SELECTED
from confsteer.evaluation.written import WrittenComparison
from confsteer.files import write_result
from confsteer.profile.profile import Profile
from confsteer.report.answer_findings import answer_findings, answer_tuning_finding
from confsteer.report.answer_tables import fitted_in_words, grouped_columns
from confsteer.report.figures import (
    Figures,
    compared_figures,
    confidence_figures,
    induction_figures,
    profile_figures,
    text_figures,
)
from confsteer.report.findings import AGAINST, OBJECTIVES, Finding, findings, significant_sign, tuning_finding
from confsteer.report.written_findings import written_findings
from confsteer.report.written_tables import fitting_in_words
from confsteer.results.bootstrap import RESAMPLES, Interval
from confsteer.tuning.tune import Tuning
from confsteer.tuning.tune_answers import AnswerTuning

PROMPTS: dict[PromptName, str] = {
    "answer": "The first question as the model reads it",
    "p_true": "For P(True), the probability of A beside B as its reply, without examples",
    "verbalised": "For the verbalised percentage, the first number in its reply, without examples",
}
"""Labels of what the model reads."""


class Cell(NamedTuple):
    """A number and its interval, as they are written."""

    value: str
    interval: str
    verdict: str = ""
    """Better or worse, for a difference beyond its interval."""


class TableRow(NamedTuple):
    """A way to predict; None where a metric could not be computed."""

    name: str
    note: str
    cells: list[Cell | None]


class Table(NamedTuple):
    """Ways to predict by metrics."""

    title: str
    columns: list[str]
    rows: list[TableRow]


class Asked(NamedTuple):
    """Question as the model read it, verbatim."""

    wording: str
    example: str
    choices: tuple[str, ...]


class Written(NamedTuple):
    """Answers in the model's own words: how they were asked for, and what became of them."""

    prompts: list[tuple[str, str]]
    """Each with what it is, verbatim."""
    answers: Table
    """Answers of each way to ask."""
    notes: str


class Section(NamedTuple):
    """The report on one text, or on one set of questions."""

    anchor: str
    title: str
    size: str
    """Numbers of what was scored."""
    resampled: str
    """Blocks that are resampled for the intervals."""
    findings: list[Finding]
    metrics: Table
    differences: list[Table]
    figures: list[Figures]
    asked: Asked | None = None
    groups: Table | None = None
    """Metrics of groups of questions, the mean over them, and of all questions together."""
    written: Written | None = None
    """Whatever is only of answers in the model's own words."""


def write_report(result: Evaluation | Tuning | AnswerTuning, file: Path, profile: Profile | None) -> None:
    """Write the report of a result, atomically.

    Args:
        result: what `confsteer.evaluation.evaluate.evaluate` or the tuner returned.
        file: to write.
        profile: of the same model, whose neurons and dials are drawn; None: they are not.

    Raises:
        ProfileMismatchError: the profile is of another model.
        ResultError: the file cannot be written.
    """
    write_result(file, render(result, profile).encode())


def render(result: Evaluation | Tuning | AnswerTuning, profile: Profile | None) -> str:
    """The page of a result; the arguments are those of `write_report`."""
    if profile is not None and profile.model.id != result.model:
        raise ProfileMismatchError(
            f"the result is of {result.model}, the profile of {profile.model.id}: give the result's profile"
        )
    tuning = result if isinstance(result, Tuning) else None
    left_out = () if tuning is None else tuning.left_out
    texts = () if isinstance(result, AnswerTuning) else result.texts
    choices = () if isinstance(result, Tuning) else result.choices
    written, induction = (result.written, result.induction) if isinstance(result, Evaluation) else ((), None)
    gain = None if tuning is None else tuning_finding(tuning)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("confsteer.report").joinpath("page.html.j2").read_text("utf-8"))
    return template.render(
        result=result,
        name=result.name,
        kind="Evaluation" if isinstance(result, Evaluation) else "Tuning",
        tuning=tuning,
        objectives=OBJECTIVES,
        gain=answer_tuning_finding(result) if isinstance(result, AnswerTuning) else gain,
        sections=[_text_section(text, f"text-{i}") for i, text in enumerate(texts, 1)]
        + [_choice_section(asked, f"choices-{i}") for i, asked in enumerate(choices, 1)]
        + [_written_section(asked, f"questions-{i}") for i, asked in enumerate(written, 1)],
        left_out=[_text_section(text, f"left-out-{i}", ", fitted without it") for i, text in enumerate(left_out, 1)],
        profile=profile,
        profile_figures=None if profile is None else profile_figures(profile),
        induction_figures=None if induction is None else induction_figures(induction),
        bins=BINS,
        mass_bins=MASS_BINS,
        selected=f"{SELECTED:.0%}",
        resamples=f"{RESAMPLES:,}",
    )


def _text_section(text: TextComparison, anchor: str, note: str = "") -> Section:
    size = f"{text.tokens:,} tokens in {text.windows:,} windows"
    return _section(text, anchor, text.source + note, size, text_figures(text))


def _choice_section(choices: ChoiceComparison, anchor: str) -> Section:
    size = f"{choices.questions:,} multiple-choice questions"
    if choices.truncated:
        size += f", {choices.truncated:,} of them cut to fit the model's context"
    section = _section(choices, anchor, choices.title, size, compared_figures(choices.rows, "questions"))
    asked = Asked(choices.wording, choices.example, choices.choices) if choices.example else None
    return section._replace(findings=answer_findings(choices), asked=asked, groups=_groups_table(choices))


def _written_section(compared: WrittenComparison, anchor: str) -> Section:
    against_written: tuple[tuple[RowKind, str], ...] = (("neutral", AGAINST["neutral"]), ("temperature", "what is fitted to it"))
    size = f"{compared.questions:,} questions answered in the model's own words"
    if compared.truncated:
        size += f", {compared.truncated:,} of them cut to fit the model's context"
    return Section(
        anchor=anchor,
        title=compared.title,
        size=size,
        resampled=f"{compared.blocks:,} {compared.unit}",
        findings=written_findings(compared),
        metrics=_confidence_table(compared, "All metrics", None),
        differences=[_confidence_table(compared, f"Difference to {against}", kind) for kind, against in against_written],
        figures=confidence_figures(compared),
        written=Written(
            [(PROMPTS[name], text) for name, text in compared.prompts.items()],
            _answers_table(compared),
            f"Answers are the likeliest token by token; self-consistency is over {compared.samples} samples of each.",
        ),
    )


def _answers_table(compared: WrittenComparison) -> Table:
    accuracy = METRICS["accuracy"]
    columns = [
        "right",
        accuracy.label,
        f"Δ {accuracy.label}",
        "mentioned",
        "changed",
        "became right",
        "became wrong",
        "cut off",
        "empty",
    ]
    rows = []
    for one in compared.answers:
        counts = [
            Cell(f"{n:,}", "")
            for n in (one.mentioned or 0, one.changed, one.became_right, one.became_wrong, one.cut_off, one.empty)
        ]
        change = _cell("accuracy", one.less_unsteered, difference=True)
        rows.append(TableRow(one.name, "", [Cell(f"{one.right:,}", ""), _cell("accuracy", one.accuracy), change, *counts]))
    return Table("The answers", columns, rows)


def _confidence_table(compared: WrittenComparison, title: str, kind: RowKind | None) -> Table:
    """Make the table of all confidences of all ways; of their differences to the row of a kind, if one is given."""
    shown = [
        (confidence, row, row.metrics if kind is None else row.minus[kind])
        for confidence in compared.confidences
        for row in confidence.rows
        if kind is None or kind in row.minus
    ]
    names = [name for name in METRICS if any(name in found for _, _, found in shown)]
    rows = []
    for confidence, row, found in shown:
        fitted, stated = fitting_in_words(confidence.confidence, row), confidence.stated(row)
        unstated = f"{compared.questions - stated:,} not stated" if stated < compared.questions else ""
        note = "; ".join(filter(None, [fitted, unstated])) if kind is None else ""
        cells = [_cell(name, found.get(name), difference=kind is not None) for name in names]
        rows.append(TableRow(f"{CONFIDENCES[confidence.confidence]}, {row.name}", note, cells))
    return Table(title, [METRICS[name].label if kind is None else f"Δ {METRICS[name].label}" for name in names], rows)


def _groups_table(choices: ChoiceComparison) -> Table | None:
    grouped, columns = choices.grouped, grouped_columns(choices)
    if grouped is None:
        return None
    rows = [
        TableRow(group.name, f"{group.questions:,}", [_cell(name, group.metrics[i].get(name)) for i, name in columns])
        for group in grouped.groups
    ]
    rows.append(
        TableRow(f"mean of {len(grouped.groups)} groups", "", [_cell(name, grouped.macro[i].get(name)) for i, name in columns])
    )
    pooled = [_cell(name, choices.rows[i].metrics.get(name)) for i, name in columns]
    rows.append(TableRow("all questions", f"{choices.questions:,}", pooled))
    return Table(f"By {grouped.by}", [f"{METRICS[name].label}, {choices.rows[i].name}" for i, name in columns], rows)


def _section(compared: TextComparison | ChoiceComparison, anchor: str, title: str, size: str, figures: list[Figures]) -> Section:
    return Section(
        anchor=anchor,
        title=title,
        size=size,
        resampled=f"{compared.blocks:,} {compared.unit}",
        findings=findings(compared.rows),
        metrics=_metrics_table(compared.rows, answers=isinstance(compared, ChoiceComparison)),
        differences=[table for kind in AGAINST if (table := _difference_table(compared.rows, kind)).rows],
        figures=figures,
    )


def _metrics_table(rows: Sequence[ComparedRow], *, answers: bool) -> Table:
    names = [name for name in METRICS if any(name in row.metrics for row in rows)]
    return Table(
        "All metrics",
        [METRICS[name].label for name in names],
        [TableRow(row.name, _note(row, answers), [_cell(name, row.metrics.get(name)) for name in names]) for row in rows],
    )


def _difference_table(rows: Sequence[ComparedRow], kind: RowKind) -> Table:
    """Make the table of every row that is compared with the row of a kind."""
    compared = [row for row in rows if kind in row.minus]
    names = [name for name in METRICS if any(name in row.minus[kind] for row in compared)]
    return Table(
        f"Difference to {AGAINST[kind]}",
        [f"Δ {METRICS[name].label}" for name in names],
        [TableRow(row.name, "", [_cell(name, row.minus[kind].get(name), difference=True) for name in names]) for row in compared],
    )


def _note(row: ComparedRow, answers: bool) -> str:
    """The one number of a baseline, per fold."""
    if not row.values:
        return ""
    if answers:
        return ("" if row.kind == "temperature and length" else "T = ") + fitted_in_words(row)
    return ("c = " if row.kind == "null write" else "T = ") + ", ".join(f"{value:.3f}" for value in row.values)


def _cell(name: str, interval: Interval | None, *, difference: bool = False) -> Cell | None:
    if interval is None:
        return None
    metric = METRICS[name]
    value, low, high = (metric.number(number, sign=difference) for number in interval)
    way = significant_sign(interval) if difference else None
    verdict = "" if way is None or metric.better is None else "better" if way == metric.better else "worse"
    return Cell(value, f"{low} … {high}", verdict)
