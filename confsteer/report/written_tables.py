"""Tables of answers in a model's own words, and what was fitted to them in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from confsteer.report.columns import Column, Table, TableConsole
from confsteer.report.tables import compared_columns, escape

if TYPE_CHECKING:
    from confsteer.evaluation.comparison import ComparedRow
    from confsteer.evaluation.confidences import ConfidenceName
    from confsteer.evaluation.written import WrittenAnswers, WrittenComparison

SHOWN = ("ece", "brier", "auroc", "coverage_area")
"""Metrics of a confidence that are not only for wide tables."""


def fitting_in_words(name: ConfidenceName, row: ComparedRow) -> str:
    """Write what was fitted to a confidence, for both halves; empty where nothing was."""
    from confsteer.evaluation.confidences import OF_TOKENS, TEMPERATURES

    if not row.values:
        return ""
    if name in OF_TOKENS:
        ends = {TEMPERATURES[0]: ", the lowest tried", TEMPERATURES[-1]: ", the highest tried"}
        said = [f"T = {value:.2f}{ends.get(value, '')}" for value in row.values]
    else:
        said = [f"logit × {row.values[i]:.2f} {row.values[i + 1]:+.2f}" for i in (0, 2)]
    return "; ".join(dict.fromkeys(said)).replace("-", "−")


def answers_table(compared: WrittenComparison) -> Table[WrittenAnswers]:
    """Describe the answers of each way to ask."""
    columns: tuple[Column[WrittenAnswers], ...] = (
        Column("name", "way", lambda row: row.name),
        Column("right", "right", lambda row: row.right, ",d"),
        Column("mentioned", "mentioned", lambda row: row.mentioned or None, ",d"),
        Column("accuracy", "accuracy", lambda row: row.accuracy, ".3f"),
        Column(
            "accuracy_minus_neutral",
            "Δ to neutral",
            lambda row: row.less_unsteered,
            "+.3f",
            difference=lambda row: row.less_unsteered,
            better="higher",
        ),
        Column("changed", "changed", lambda row: row.changed, ",d"),
        Column("became_right", "now right", lambda row: row.became_right, ",d"),
        Column("became_wrong", "now wrong", lambda row: row.became_wrong, ",d"),
        Column("cut_off", "cut off", lambda row: row.cut_off, ",d"),
        Column("empty", "empty", lambda row: row.empty, ",d"),
    )
    return Table(f"{compared.title}: {compared.questions:,} questions", columns, [compared.answers], _about(compared))


def confidence_tables(compared: WrittenComparison) -> list[Table[ComparedRow]]:
    """Describe each confidence in the answers, one to a table."""
    columns = compared_columns(SHOWN, digits=3)
    return [
        Table(compared.title, columns, [one.rows], _about(compared) | {"confidence": one.confidence})
        for one in compared.confidences
    ]


def _about(compared: WrittenComparison) -> dict[str, str | int]:
    return {"source": compared.source, "wording": compared.wording, "questions": compared.questions}


def written_tables(compared: WrittenComparison) -> list[Table[Any]]:
    """Describe answers and confidences as CSV has them."""
    return [answers_table(compared), *confidence_tables(compared)]


def print_written(console: TableConsole, model: str, compared: WrittenComparison) -> None:
    """Print the answers of each way to ask, then each confidence in them."""
    from confsteer.evaluation.confidences import CONFIDENCES

    console.table(answers_table(compared))
    sections, fitted, fewer = [], [], []
    for one in compared.confidences:
        label = CONFIDENCES[one.confidence]
        sections.append([row.model_copy(update={"name": f"{label}, {row.name}"}) for row in one.rows])
        fitted += [f"{label}: {said}" for row in one.rows if (said := fitting_in_words(one.confidence, row))]
        fewer += [f"{label}, {escape(row.name)}: {one.stated(row):,}" for row in one.rows if one.stated(row) < compared.questions]
    console.table(Table(f"{compared.title}: confidence in the answers", compared_columns(SHOWN, digits=3), sections))
    if compared.answers[0].mentioned:
        console.print(
            "Mentioned: wrong answers that have the words of an accepted one among others. Whole sentences do not count as "
            "right: --shots FILE shows the model to answer in a word."
        )
    truncated = f", {compared.truncated} of them without their beginning, to fit the context" if compared.truncated else ""
    missing = f" Questions with that confidence, where not all have it: {'; '.join(fewer)}." if fewer else ""
    console.print(
        f"Fitted, to one half of the questions and used on the other, a temperature of tokens, or a slope and a constant of the "
        f"confidence's logit ({' | '.join(fitted)}).{missing}"
    )
    console.print(
        f"{escape(model)} on {escape(compared.source)}: {compared.questions:,} questions{truncated}. Answers are the likeliest "
        f"token by token; {compared.samples} samples of each for self-consistency. Cut off: no end within the tokens allowed. "
        "Empty: nothing in it to compare. Coverage area: 1 less the area under risk and "
        "coverage. AUROC has no value where no answer is right or all are; ECE then says little. ECE of 15 bins; "
        f"± half of the 95 % bootstrap interval over {compared.blocks} {compared.unit}; * differs from neutral by the interval "
        "of the paired difference (green: better, red: worse)."
    )
