"""Tables of answers in a model's own words, for a terminal, and what was fitted to them in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from confsteer.report.tables import escape, short_name, with_half_width, with_range

if TYPE_CHECKING:
    from confsteer.evaluation.comparison import ComparedRow
    from confsteer.evaluation.confidences import ConfidenceName
    from confsteer.evaluation.written import WrittenComparison
    from confsteer.results.bootstrap import Interval

SHOWN = ("accuracy", "ece", "brier", "auroc", "coverage_area")
"""Metrics of a table in a terminal."""


def fitting_in_words(name: ConfidenceName, row: ComparedRow) -> str:
    """Write what was fitted to a confidence, for both halves; empty where nothing was."""
    from confsteer.evaluation.confidences import OF_TOKENS

    if not row.values:
        return ""
    if name in OF_TOKENS:
        said = [f"T = {value:.2f}" for value in row.values]
    else:
        said = [f"logit × {row.values[i]:.2f} {row.values[i + 1]:+.2f}" for i in (0, 2)]
    return "; ".join(dict.fromkeys(said)).replace("-", "−")


def print_written(console: Console, model: str, compared: WrittenComparison) -> None:
    """Print the answers of each way to ask, then each confidence in them."""
    from confsteer.evaluation.confidences import CONFIDENCES
    from confsteer.evaluation.metrics import METRICS

    table = Table("", title=escape(f"{compared.title}: {compared.questions:,} questions"), title_justify="left")
    for heading in ("right", "accuracy", "Δ to neutral", "changed", "became right", "became wrong", "cut off", "empty"):
        table.add_column(heading, justify="right")
    for one in compared.answers:
        table.add_row(
            short_name(one.name),
            f"{one.right:,}",
            with_half_width(one.accuracy, 3),
            with_range(one.less_unsteered) if one.less_unsteered else "",
            *(f"{number:,}" for number in (one.changed, one.became_right, one.became_wrong, one.cut_off, one.empty)),
        )
    console.print(table)
    table = Table("confidence", "", title=escape(f"{compared.title}: confidence in the answers"), title_justify="left")
    for heading in ("stated", *(METRICS[name].heading for name in SHOWN)):
        table.add_column(heading, justify="right")
    for confidence in compared.confidences:
        for row in confidence.rows:
            fitted = fitting_in_words(confidence.confidence, row)
            table.add_row(
                CONFIDENCES[confidence.confidence] if row.kind == "neutral" else "",
                short_name(row.name) + (f" ({fitted})" if fitted else ""),
                f"{confidence.stated(row):,}",
                *(_cell(name, row.metrics.get(name)) for name in SHOWN),
                end_section=row is confidence.rows[-1],
            )
    console.print(table)
    truncated = f", {compared.truncated} of them without their beginning, to fit the context" if compared.truncated else ""
    console.print(
        f"{escape(model)} on {escape(compared.source)}: {compared.questions:,} questions{truncated}; answers are the likeliest "
        f"token by token, {compared.samples} samples of each for self-consistency. Fitted, to one half of the questions and used "
        "on the other: a temperature of tokens, or a slope and a constant of the confidence's logit. Coverage area: 1 less the "
        "area under risk and coverage. AUROC has no value where no answer is right or all are; stated: answers with that "
        f"confidence. ECE of 15 bins; ± half of the 95 % bootstrap interval over {compared.blocks} {compared.unit}, in "
        "brackets an interval."
    )


def _cell(name: str, interval: Interval | None) -> str:
    if interval is None:
        return "–"
    # The interval of a calibration error is not symmetric: noise makes the error itself too large.
    return "{:.3f} ({:.3f}…{:.3f})".format(*interval) if name == "ece" else with_half_width(interval, 3)
