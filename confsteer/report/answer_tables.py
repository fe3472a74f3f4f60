"""Tables of answers to multiple-choice questions, for a terminal, and the numbers of their baselines in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from confsteer.report.tables import escape, short_name, with_half_width

if TYPE_CHECKING:
    from confsteer.evaluation.choices import ChoiceComparison
    from confsteer.evaluation.comparison import ComparedRow
    from confsteer.evaluation.lm_eval_samples import TaskCalibration
    from confsteer.results.bootstrap import Interval
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


def print_choices(console: Console, model: str, compared: ChoiceComparison) -> None:
    """Print ways to answer the same questions; matched temperatures are columns beside their steering."""
    from confsteer.evaluation.answers import MAX_TEMPERATURE, MIN_TEMPERATURE
    from confsteer.evaluation.metrics import METRICS

    names = ("accuracy", "loss", "entropy", "ece", "argmax_changed")
    table = Table(
        "", *(METRICS[name].heading for name in names[:-1]), "changed", title=escape(compared.title), title_justify="left"
    )
    table.add_column("Δloss to same entropy", justify="right")
    table.add_column("ΔECE to it", justify="right")
    last = [row.kind for row in compared.rows if row.kind not in ("steering", "matched temperature")][-1]
    for i, row in enumerate(compared.rows):
        if row.kind == "matched temperature":
            continue
        matched = row.minus.get("matched temperature", {})
        following = compared.rows[i + 1].kind if i + 1 < len(compared.rows) else ""
        table.add_row(
            short_name(row.name),
            *(_cell(name, row.metrics.get(name)) for name in names),
            *(_cell("Δ", matched[name]) if matched else "" for name in ("loss", "ece")),
            end_section=row.kind == last and following in ("steering", ""),
        )
    console.print(table)
    numbers = [f"{short_name(row.name)}: {fitted_in_words(row)}" for row in compared.rows if row.kind in FITTED]
    console.print(f"Fitted, to one half and used on the other where there are two: {'. '.join(numbers)}.")
    truncated = f", {compared.truncated} of them without their beginning, to fit the context" if compared.truncated else ""
    console.print(
        f"{escape(model)} on {escape(compared.source)}: {compared.questions:,} questions{truncated}. The confidence in an answer "
        "is its share of the probability of all choices. Temperatures are on the log-likelihoods of whole choices (or on those "
        f"per character, per token), between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:,.0f}. Nats; ECE of 15 bins; ± half of the "
        f"95 % bootstrap interval over {compared.blocks} {compared.unit}, in brackets an interval; Δ are paired, to the "
        "temperature of the same mean entropy. Changed: answers that are not the unsteered model's."
    )
    if compared.grouped is not None:
        print_groups(console, compared)


def _cell(name: str, interval: Interval | None) -> str:
    if interval is None:
        return ""
    if name == "entropy":
        return f"{interval.value:.3f}"
    if name == "argmax_changed":
        return f"{interval.value:.1%}"
    # The interval of a calibration error is not symmetric: noise makes the error itself too large.
    if name in ("ece", "Δ"):
        return "{:{f}} ({:{f}}…{:{f}})".format(*interval, f="+.3f" if name == "Δ" else ".3f")
    return with_half_width(interval, 3)


def grouped_columns(compared: ChoiceComparison) -> list[tuple[int, str]]:
    """Choose the rows and metrics of a table of groups: row of the comparison, name of the metric."""
    kinds = [row.kind for row in compared.rows]
    steerings = [i for i, kind in enumerate(kinds) if kind == "steering"][:MAX_GROUPED_STEERINGS]
    shown = [(0, "accuracy"), (0, "ece")] + [(i, "ece") for i, kind in enumerate(kinds) if kind == "temperature"]
    return shown + [(i, name) for i in steerings for name in ("accuracy", "ece")]


def print_groups(console: Console, compared: ChoiceComparison) -> None:
    """Print metrics of groups of questions, their mean over groups and over all questions."""
    from confsteer.evaluation.metrics import METRICS

    grouped, columns = compared.grouped, grouped_columns(compared)
    if grouped is None:
        return
    table = Table(escape(grouped.by), "questions", title=escape(f"{compared.title} by {grouped.by}"), title_justify="left")
    for i, name in columns:
        table.add_column(f"{METRICS[name].heading}, {short_name(compared.rows[i].name)}", justify="right")
    for group in grouped.groups:
        cells = (_cell(name, group.metrics[i].get(name)) for i, name in columns)
        table.add_row(escape(group.name), f"{group.questions:,}", *cells, end_section=group is grouped.groups[-1])
    macro = (_cell(name, grouped.macro[i].get(name)) for i, name in columns)
    table.add_row(f"mean of {len(grouped.groups)} groups", f"{compared.questions:,}", *macro)
    pooled = (_cell(name, compared.rows[i].metrics.get(name)) for i, name in columns)
    table.add_row("all questions", f"{compared.questions:,}", *pooled)
    console.print(table)
    console.print("The ECE of few questions is mostly noise, and so is the mean of such: read it with its interval.")


def print_answer_tuning(console: Console, result: AnswerTuning) -> None:
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


def print_answer_calibration(console: Console, rows: Sequence[TaskCalibration]) -> None:
    """Print multiple-choice tasks of lm-eval."""
    from confsteer.evaluation.metrics import METRICS

    names = ("accuracy", "ece", "ece_equal_mass", "brier", "auroc")
    table = Table("task", "n", "left out", *(METRICS[name].heading for name in names))
    for row in rows:
        numbers = (with_half_width(row.metrics[name], 4) if name in row.metrics else "" for name in names)
        table.add_row(escape(row.task), f"{row.n:,}", f"{row.left_out:,}", *numbers)
    console.print(table)
    console.print(
        "Of the likeliest choice, whose confidence is its share of the probability of all choices; ECE over 15 bins of equal "
        "width and 10 of equal numbers; ± half of the 95 % bootstrap interval over questions. Left out: questions whose samples "
        "do not name one right choice."
    )
