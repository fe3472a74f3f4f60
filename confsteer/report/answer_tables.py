"""Tables of answers to multiple-choice questions, for a terminal, and the numbers of their baselines in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from confsteer.report.columns import MAX_WIDE_NAME, Column, Table, TableConsole, shortened
from confsteer.report.tables import compared_columns, compared_sections, escape, text_columns
from confsteer.report.written_tables import written_tables

if TYPE_CHECKING:
    from confsteer.evaluation.choices import AnswerGroup, ChoiceComparison
    from confsteer.evaluation.comparison import ComparedRow
    from confsteer.evaluation.evaluate import Evaluation
    from confsteer.evaluation.lm_eval_samples import TaskCalibration
    from confsteer.tuning.tune_answers import AnswerTuning

FITTED = ("temperature", "temperature and length", "scoring")
"""Kinds of rows with numbers that were fitted."""
MAX_GROUPED_STEERINGS = 3
"""Steerings in a table of groups."""


def temperature_in_words(value: float) -> str:
    """Write a temperature on answers; at an end of the range of the search, what that end means."""
    from confsteer.evaluation.answers import MAX_TEMPERATURE, MIN_TEMPERATURE

    if value > 0.999 * MAX_TEMPERATURE:
        return "∞: all choices alike"
    if value < 1.001 * MIN_TEMPERATURE:
        return f"{MIN_TEMPERATURE}, the lowest tried"
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def fitted_in_words(row: ComparedRow) -> str:
    """Write the numbers fitted for a row of answers, of both halves; empty where none were."""
    if row.kind == "temperature and length":
        folds = [row.values[:3], row.values[3:]]
        said = [f"T {temperature_in_words(t)}, {token:+.2f} a token, {letter:+.3f} a character" for t, token, letter in folds]
    else:
        said = [temperature_in_words(value) for value in row.values]
    return "; ".join(dict.fromkeys(said)).replace("-", "−")


def answer_columns() -> tuple[Column[ComparedRow], ...]:
    """Describe the columns of ways to answer questions."""
    return compared_columns(("accuracy", "loss", "ece"), digits=3)


def evaluation_tables(result: Evaluation) -> list[Table[Any]]:
    """Describe an evaluation as CSV has it: all rows of each text, of questions, groups of them and confidences."""
    found: list[Table[Any]] = [
        Table(text.source, text_columns(), [text.rows], {"source": text.source, "tokens": text.tokens, "windows": text.windows})
        for text in result.texts
    ]
    for compared in result.choices:
        about: dict[str, str | int] = {"source": compared.source, "wording": compared.wording}
        whole = about | {"questions": compared.questions}
        found.append(Table(compared.title, answer_columns(), [compared.rows], whole))
        for group in (*compared.grouped.groups, _mean(compared)) if compared.grouped else ():
            metrics = zip(compared.rows, group.metrics, strict=True)
            rows = [row.model_copy(update={"metrics": own, "minus": {}}) for row, own in metrics]
            part = about | {"questions": group.questions, "group": group.name}
            found.append(Table(compared.title, answer_columns(), [rows], part))
    return found + [table for written in result.written for table in written_tables(written)]


def print_choices(console: TableConsole, model: str, compared: ChoiceComparison) -> None:
    """Print ways to answer the same questions."""
    from confsteer.evaluation.answers import MAX_TEMPERATURE, MIN_TEMPERATURE

    title = f"{compared.title}: {compared.questions:,} questions"
    console.table(Table(title, answer_columns(), compared_sections(compared.rows)))
    numbers = [f"{escape(row.name)}: {fitted_in_words(row)}" for row in compared.rows if row.kind in FITTED]
    console.print(f"Fitted, to one half and used on the other where there are two: {'. '.join(numbers)}.")
    truncated = f", {compared.truncated} of them without their beginning, to fit the context" if compared.truncated else ""
    console.print(
        f"{escape(model)} on {escape(compared.source)}: {compared.questions:,} questions{truncated}. The confidence in an answer "
        "is its share of the probability of all choices. Temperatures are on the log-likelihoods of whole choices (or on those "
        f"per character, per token), between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:,.0f}. Nats; ECE of 15 bins; ± half of the "
        f"95 % bootstrap interval over {compared.blocks} {compared.unit}; T: the temperature of the same mean entropy; * differs "
        "from neutral, or a Δ from zero, by the interval of the paired difference (green: better, red: worse)."
    )
    if compared.grouped is not None:
        print_groups(console, compared)


def grouped_columns(compared: ChoiceComparison) -> list[tuple[int, str]]:
    """Choose the rows and metrics of a table of groups: row of the comparison, name of the metric."""
    kinds = [row.kind for row in compared.rows]
    steerings = [i for i, kind in enumerate(kinds) if kind == "steering"][:MAX_GROUPED_STEERINGS]
    shown = [(0, "accuracy"), (0, "ece")] + [(i, "ece") for i, kind in enumerate(kinds) if kind == "temperature"]
    return shown + [(i, name) for i in steerings for name in ("accuracy", "ece")]


def _mean(compared: ChoiceComparison) -> AnswerGroup:
    """Take the mean over groups for a group."""
    from confsteer.evaluation.choices import AnswerGroup

    assert compared.grouped is not None
    name = f"mean of {len(compared.grouped.groups)} groups"
    return AnswerGroup(name=name, questions=compared.questions, metrics=compared.grouped.macro)


def print_groups(console: TableConsole, compared: ChoiceComparison) -> None:
    """Print metrics of groups of questions, their mean over groups and over all questions."""
    from confsteer.evaluation.choices import AnswerGroup
    from confsteer.evaluation.metrics import METRICS

    grouped = compared.grouped
    if grouped is None:
        return
    pooled = tuple(row.metrics for row in compared.rows)
    everything = AnswerGroup(name="all questions", questions=compared.questions, metrics=pooled)
    steerings = [i for i, row in enumerate(compared.rows) if row.kind == "steering"][:MAX_GROUPED_STEERINGS]

    def metric(i: int, name: str) -> Column[AnswerGroup]:
        row = compared.rows[i]
        way = f" [{steerings.index(i) + 1}]" if i in steerings else " fitted T" if row.kind == "temperature" else ""
        return Column(
            f"{name}_{i}",
            f"{METRICS[name].heading}{way}",
            lambda group: group.metrics[i].get(name),
            ".3f",
            wide=i in steerings and (name == "accuracy" or i != steerings[0]),
        )

    columns: tuple[Column[AnswerGroup], ...] = (
        Column(grouped.by, grouped.by, lambda group: group.name),
        Column("questions", "questions", lambda group: group.questions, ",d"),
        *(metric(i, name) for i, name in grouped_columns(compared)),
    )
    console.table(Table(f"{compared.title} by {grouped.by}", columns, [grouped.groups, [_mean(compared), everything]]))
    shown = steerings if console.wide else steerings[:1]
    said = "; ".join(
        f"\\[{number}] {escape(shortened(compared.rows[i].name, MAX_WIDE_NAME))}" for number, i in enumerate(shown, start=1)
    )
    console.print(
        f"{said}{'. ' if said else ''}The ECE of few questions is mostly noise, and so is the mean of such: read it with its "
        "interval."
    )


def print_answer_tuning(console: TableConsole, result: AnswerTuning) -> None:
    """Print what tuning on answers found, on questions that it did not see."""
    for compared in result.choices:
        print_choices(console, result.name, compared)
    value, low, high = (f"{number:+.4f}" for number in result.validation)
    tuned, alone = (temperature_in_words(one) for one in (result.temperature, result.alone))
    console.print(
        f"Tuned: {escape(str(result.steering))}",
        f"{escape(result.name)}: {result.parameters} tuned for the loss of answers on {result.questions['train']:,} questions, "
        f"{result.steps} steps, {result.seconds:.0f} s. The tables are of the test part. On the validation part, "
        f"{result.questions['validation']:,} questions, the steering with its temperature ({tuned}) changes the loss by {value} "
        f"({low} … {high}) nats against the temperature alone ({alone}).",
        sep="\n",
    )


def print_answer_calibration(console: TableConsole, rows: Sequence[TaskCalibration]) -> None:
    """Print multiple-choice tasks of lm-eval."""
    from confsteer.evaluation.metrics import METRICS

    def metric(name: str) -> Column[TaskCalibration]:
        return Column(name, METRICS[name].heading, lambda row: row.metrics.get(name), ".4f")

    columns: tuple[Column[TaskCalibration], ...] = (
        Column("task", "task", lambda row: row.task),
        Column("n", "n", lambda row: row.n, ",d"),
        Column("left_out", "left out", lambda row: row.left_out, ",d"),
        *map(metric, ("accuracy", "ece", "ece_equal_mass", "brier", "auroc")),
    )
    console.table(Table("Calibration of the answers", columns, [rows]))
    console.print(
        "Of the likeliest choice, whose confidence is its share of the probability of all choices; ECE over 15 bins of equal "
        "width and 10 of equal numbers; ± half of the 95 % bootstrap interval over questions. Left out: questions whose samples "
        "do not name one right choice."
    )
