"""Pictures for the page, with what they say to whom does not see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from confsteer.evaluation.comparison import ComparedRow, Row, TextComparison
from confsteer.evaluation.confidences import CONFIDENCES
from confsteer.evaluation.metrics import METRICS
from confsteer.evaluation.written import WrittenComparison
from confsteer.profile.profile import Profile
from confsteer.report import plots
from confsteer.report.findings import shortened
from confsteer.steering import DIALS
from confsteer.studies.induction import InductionStudy

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # The same picture has the same bytes.
    "svg.hashsalt": "confsteer",
}
PANEL = (3.4, 2.8)
"""Inches. About the width of a phone, so that the letters stay their size there."""


class Panel(NamedTuple):
    """A picture with what it says to whom does not see it, and what stands below it."""

    source: str
    """A data URI."""
    alt: str
    caption: str = ""


class Figures(NamedTuple):
    """Panels that are read in one way."""

    title: str
    how: str
    """How to read them."""
    panels: list[Panel]


def compared_figures(all_rows: Sequence[ComparedRow], what: str) -> list[Figures]:
    """Draw what any comparison has: of predictions of tokens, or of answers to questions."""
    rows = plots.rows_to_draw(all_rows)
    steerings, shown = (sum(row.kind == "steering" for row in some) for some in (all_rows, rows))
    some = f" Of the {steerings} steerings {shown} are drawn: spread over their order, with the lowest loss and ECE among them."
    return [
        Figures(
            "Reliability",
            f"Each dot is a bin of {what} by confidence, as large as its share of them. On the dotted line the model is right as "
            "often as it says; below the line it is overconfident, above it underconfident. The band is the 95 % interval."
            + (some if shown < steerings else ""),
            [_reliability_panel(row) for row in rows],
        ),
        Figures(
            "Risk and coverage",
            "If the model answered only where it is surest, how often would it be wrong? Lower is better. A temperature changes "
            "the order of confidences little: curves that lie on each other differ in how sure the model is, not in where it is "
            "sure.",
            [_panel(partial(plots.draw_risk, rows=rows), f"Error rate against coverage of {_names(rows)}.")],
        ),
    ]


def confidence_figures(compared: WrittenComparison) -> list[Figures]:
    """Draw each confidence in written answers, as far as it was stated."""
    found = []
    for one in compared.confidences:
        if rows := [row for row in one.rows if row.reliability]:
            figures = compared_figures(rows, "answers")
            found += [part._replace(title=f"{CONFIDENCES[one.confidence]}: {part.title.lower()}") for part in figures]
    return found


def _names(rows: Sequence[ComparedRow]) -> str:
    return ", ".join(shortened(row.name, 60) for row in rows)


def text_figures(text: TextComparison) -> list[Figures]:
    rows, neutral = plots.rows_to_draw(text.rows), text.rows[0]
    names = _names(rows)
    reliability, risk = compared_figures(text.rows, "tokens")
    found = [reliability]
    dials = [dial for dial in DIALS if plots.single_dial_rows(text, dial)]
    if dials:
        found.append(
            Figures(
                "Asked and obtained",
                "A dial promises a change in nats, measured when the model was calibrated. Points on the dotted line got what "
                "they asked for on this text. The unigram dial can keep its promise only where the unigram "
                "distribution is the one it was calibrated with.",
                [
                    _panel(
                        partial(plots.draw_obtained, text=text, dial=dial),
                        f"Change obtained against change asked of the {dial} dial, at {len(plots.single_dial_rows(text, dial))} "
                        "values.",
                        f"The {dial} dial.",
                    )
                    for dial in dials
                ],
            )
        )
    found += [
        risk,
        Figures(
            "Entropy of the predictions",
            "Left are tokens that the model is sure of, right those of which it has no idea. A steering that raises the entropy "
            "moves mass to the right.",
            [
                _panel(
                    partial(plots.draw_entropies, rows=rows, vocab_size=text.vocab_size),
                    f"Histogram of the entropy of predictions of {names}.",
                )
            ],
        ),
        _frequency_figures(rows, neutral),
    ]
    return found


def _frequency_figures(rows: Sequence[Row], neutral: Row) -> Figures:
    names = _names(rows)
    return Figures(
        "By how frequent the token is",
        "Tokens that came, cut into tenths by their probability in the unigram distribution. The second picture shows where "
        "a steering pays and where it gains; in the third, confidence above the dotted accuracy is overconfidence.",
        [
            _panel(
                partial(plots.draw_by_frequency, rows=rows, measure="loss"),
                f"Mean loss by tenth of token frequency of {names}.",
                "Loss.",
            ),
            _panel(
                partial(plots.draw_by_frequency, rows=rows, measure="loss", minus=neutral),
                f"Mean loss less neutral's by tenth of token frequency of {names}.",
                "Loss less neutral's.",
            ),
            _panel(
                partial(plots.draw_by_frequency, rows=rows, measure="confidence"),
                f"Mean confidence by tenth of token frequency of {names}.",
                "Confidence.",
            ),
        ],
    )


def _reliability_panel(row: ComparedRow) -> Panel:
    ece, name = METRICS["ece"], shortened(row.name, 60)
    value, low, high = (ece.number(number) for number in row.metrics["ece"])
    caption = f"{name}: ECE {value} ({low} to {high})"
    return _panel(partial(plots.draw_reliability, row=row), f"Reliability diagram of {caption}.", caption, size=(3.4, 3.3))


def profile_figures(profile: Profile) -> Figures:
    n = f"{profile.model.n_neurons:,} neurons of layer {profile.model.layer}"
    panels = [
        _panel(partial(plots.draw_writes, profile=profile), f"Norm of the write against logit variance of {n}."),
        _panel(partial(plots.draw_null_fraction, profile=profile), f"Null fraction of {n}, against what they do."),
    ]
    if profile.corpus is None:
        panels.append(_panel(partial(plots.draw_spectrum, profile=profile), "Singular values of the unembedding."))
    panels += [
        _panel(partial(plots.draw_response, profile=profile, dial=dial), f"Response of the {dial} dial.")
        for dial in DIALS
        if dial in profile.response
    ]
    return Figures(
        "The profile's neurons and dials",
        "Entropy neurons (red) write where the unembedding reads little: a low logit variance, a null fraction beyond chance; "
        "and most of what they do to the entropy goes through the final norm, which makes for a mediation near 1 unless the "
        "rest opposes it. The curves are what the dials did to the text the profile was calibrated on.",
        panels,
    )


def induction_figures(study: InductionStudy) -> Figures:
    measures: tuple[plots.Measure, ...] = ("entropy", "loss", "activation")
    panels = [
        _panel(
            partial(plots.draw_repetition, kind=kind, measure=measure),
            f"Mean {measure} by position of {kind.kind} sequences read twice, unsteered and with entropy neurons clipped.",
            f"{kind.kind.capitalize()} tokens: {measure}.",
        )
        for kind in study.kinds
        for measure in measures
    ]
    return Figures(
        "When a text repeats itself",
        f"A stretch of {study.half} tokens is read twice; at the dotted line it begins again. Each entropy neuron is clipped at "
        "its mean of the first reading. How far the clipped curve of the entropy stays above the black one at the second reading "
        "is what these neurons do for confidence in what was read before.",
        panels,
    )


def _panel(draw: Callable[[Axes], object], alt: str, caption: str = "", *, size: tuple[float, float] = PANEL) -> Panel:
    """Axes drawn on, as a vector picture, with the legend below them, where it covers nothing.

    Args:
        draw: what is on them.
        alt: what it shows.
        caption: what stands below it.
        size: inches, without the legend.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if inside := axes.get_legend():
            inside.remove()
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            columns = 2 if max(map(len, labels)) <= 22 else 1
            figure.set_figheight(size[1] + 0.17 * -(-len(labels) // columns))
            figure.legend(handles, labels, loc="outside lower left", fontsize="small", ncols=columns)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    return Panel("data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode(), alt, caption)
