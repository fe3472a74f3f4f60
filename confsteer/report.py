"""An evaluation or a tuning as one HTML file: no script, no request to anywhere, nothing beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import ValidationError

from confsteer import plots
from confsteer.errors import ProfileMismatchError, ResultError, first_problem
from confsteer.evaluation.choices import ChoiceComparison
from confsteer.evaluation.comparison import COMPARED, ComparedRow, Kind, TextComparison
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.metrics import BINS, MASS_BINS, SELECTED
from confsteer.files import read_at_most, write_result
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import RESAMPLES, Interval
from confsteer.steering import DIALS
from confsteer.studies.induction import InductionStudy
from confsteer.tuning.tune import Tuning

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # The same picture has the same bytes.
    "svg.hashsalt": "confsteer",
}
MAX_BYTES = 100_000_000
"""Of results: those of a hundred texts with a hundred steerings each fit."""
PANEL = (3.4, 2.8)
"""Inches. About the width of a phone, so that the letters stay their size there."""


class Metric(NamedTuple):
    """How a metric is shown."""

    label: str
    digits: int = 4
    better: Literal["lower", "higher"] | None = None
    """None where neither is good or bad in itself."""
    percent: bool = False

    def number(self, value: float, *, sign: bool = False) -> str:
        """With a true minus sign."""
        if self.percent:
            return f"{value:.{self.digits}%}".replace("-", "−")
        return f"{value:{'+' if sign else ''}.{self.digits}f}".replace("-", "−")


METRICS = {
    "loss": Metric("loss", better="lower"),
    "perplexity": Metric("perplexity", 1, "lower"),
    "entropy": Metric("entropy"),
    "ece": Metric("ECE", better="lower"),
    "ece_equal_mass": Metric("equal-mass ECE", better="lower"),
    "mce": Metric("MCE", better="lower"),
    "smooth_ece": Metric("smooth ECE", better="lower"),
    "brier": Metric("Brier score", better="lower"),
    "brier_multiclass": Metric("multi-class Brier score", better="lower"),
    "accuracy": Metric("accuracy", better="higher"),
    "accuracy_normalised": Metric("accuracy by length", better="higher"),
    "auroc": Metric("AUROC", better="higher"),
    "selective_accuracy": Metric("selective accuracy", better="higher"),
    "coverage_area": Metric("coverage area", better="higher"),
    "kl_model_unigram": Metric("KL(model ‖ unigram)", 3),
    "kl_unigram_model": Metric("KL(unigram ‖ model)", 3),
    "argmax_changed": Metric("argmax changed", 1, percent=True),
}
"""In the order of the tables, by the names in `confsteer.evaluation.metrics`."""
JUDGED = ("loss", "ece", "brier")
"""What decides whether a steering is more than a temperature."""
LISTED = "loss, ECE and Brier score"
OBJECTIVES = {"nll": "loss", "brier": "Brier score", "ece": "ECE"}
AGAINST: dict[Kind, str] = {
    "neutral": "the unsteered model",
    "temperature": "the fitted temperature",
    "matched temperature": "the temperature of the same mean entropy",
}


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


class Cell(NamedTuple):
    """A number and its interval, as they are written."""

    value: str
    interval: str
    verdict: str = ""
    """Of a difference: better or worse, if it is beyond its interval."""


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


class Section(NamedTuple):
    """What the report says of one text, or of one set of questions."""

    anchor: str
    title: str
    size: str
    """What was scored."""
    resampled: str
    """What is resampled for the intervals."""
    findings: list[Finding]
    metrics: Table
    differences: list[Table]
    figures: list[Figures]


def read_result(file: Path) -> Evaluation | Tuning:
    """The evaluation or the tuning that ``confsteer eval --json`` or ``confsteer tune --json`` wrote.

    Raises:
        ResultError: the file is neither.
    """
    way_out = "Write one with confsteer eval … --json FILE or confsteer tune … --json FILE"
    try:
        document = json.loads(read_at_most(file, MAX_BYTES))
    except OSError as error:
        raise ResultError(f"cannot read {file}: {error.strerror}. {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{file} is not JSON: {error}. {way_out}") from error
    if not isinstance(document, dict):
        raise ResultError(f"{file} is JSON, but a list or a value where an evaluation or a tuning is an object. {way_out}")
    # Only a tuning has an objective; the class then says what is wrong with the rest.
    kind: type[Evaluation] | type[Tuning] = Tuning if "objective" in document else Evaluation
    try:
        result = kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        problem = first_problem(error, whole="the document")
        raise ResultError(f"{file} is not of this version's {kind.__name__.lower()}: {problem}. {way_out}") from error
    compared: list[TextComparison | ChoiceComparison] = [*result.texts]
    compared += result.left_out if isinstance(result, Tuning) else result.choices
    for one in compared:
        if not one.rows or one.rows[0].kind != "neutral":
            raise ResultError(f"{file}: the first row of {one.source!r} is not neutral, which all others are compared with")
        for row in one.rows:
            needed = {*JUDGED, "argmax_changed", "kl_model_unigram"} if isinstance(one, TextComparison) else {*JUDGED}
            missing = needed - row.metrics.keys()
            if row.kind == "steering":
                missing |= {f"{name} less neutral's" for name in {"entropy", *JUDGED} - row.minus.get("neutral", {}).keys()}
            if missing:
                raise ResultError(f"{file}: {row.name!r} on {one.source!r} has no {', '.join(sorted(missing))}. {way_out}")
    return result


def write_report(result: Evaluation | Tuning, file: Path, profile: Profile | None) -> None:
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


def render(result: Evaluation | Tuning, profile: Profile | None) -> str:
    """The page of a result; the arguments are those of `write_report`."""
    if profile is not None and profile.model.id != result.model:
        raise ProfileMismatchError(
            f"the result is of {result.model}, the profile of {profile.model.id}: give the result's profile"
        )
    tuning = result if isinstance(result, Tuning) else None
    left_out = () if tuning is None else tuning.left_out
    choices, induction = (result.choices, result.induction) if isinstance(result, Evaluation) else ((), None)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("confsteer").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        result=result,
        tuning=tuning,
        objectives=OBJECTIVES,
        gain=None if tuning is None else _tuning_finding(tuning),
        sections=[_text_section(text, f"text-{i}") for i, text in enumerate(result.texts, 1)]
        + [_choice_section(asked, f"choices-{i}") for i, asked in enumerate(choices, 1)],
        left_out=[_text_section(text, f"left-out-{i}", ", fitted without it") for i, text in enumerate(left_out, 1)],
        profile=profile,
        profile_figures=None if profile is None else _profile_figures(profile),
        induction_figures=None if induction is None else _induction_figures(induction),
        bins=BINS,
        mass_bins=MASS_BINS,
        selected=f"{SELECTED:.0%}",
        resamples=f"{RESAMPLES:,}",
    )


def _text_section(text: TextComparison, anchor: str, note: str = "") -> Section:
    size = f"{text.tokens:,} tokens in {text.windows:,} windows"
    return _section(text, anchor, text.source + note, size, _text_figures(text))


def _choice_section(choices: ChoiceComparison, anchor: str) -> Section:
    size = f"{choices.questions:,} multiple-choice questions"
    if choices.truncated:
        size += f", {choices.truncated:,} of them cut to fit the model's context"
    return _section(choices, anchor, choices.source, size, _compared_figures(choices.rows, "questions"))


def _section(compared: TextComparison | ChoiceComparison, anchor: str, title: str, size: str, figures: list[Figures]) -> Section:
    return Section(
        anchor=anchor,
        title=title,
        size=size,
        resampled=f"{compared.blocks:,} {compared.unit}",
        findings=_findings(compared.rows),
        metrics=_metrics_table(compared.rows),
        differences=[table for kind in AGAINST if (table := _difference_table(compared.rows, kind)).rows],
        figures=figures,
    )


def beyond(difference: Interval) -> Literal["lower", "higher"] | None:
    """Which way a paired difference goes, or None if its interval contains zero."""
    return "lower" if difference.high < 0 else "higher" if difference.low > 0 else None


def _says(name: str, difference: Interval) -> str:
    """``ECE is lower by 0.0240 (0.0120 to 0.0360)``"""
    metric, way = METRICS[name], beyond(difference)
    if way is None:
        low, high = (metric.number(bound, sign=True) for bound in difference[1:])
        return f"{metric.label}: no difference beyond the interval ({low} to {high})"
    size, *bounds = (metric.number(abs(number)) for number in difference)
    low, high = reversed(bounds) if way == "lower" else bounds
    return f"{metric.label} is {way} by {size} ({low} to {high})"


def _against(row: ComparedRow, kind: Kind, names: Sequence[str]) -> Differences:
    found = row.minus.get(kind, {})
    return Differences(f"Against {AGAINST[kind]}", [_says(name, found[name]) for name in names if name in found])


def _findings(rows: Sequence[ComparedRow]) -> list[Finding]:
    """Answers in words, none of which goes beyond the intervals. They are of the steering of the lowest ECE."""
    steerings = [row for row in rows if row.kind == "steering"]
    if not steerings:
        return []
    best = min(steerings, key=lambda row: row.metrics["ece"].value)
    return [_better_calibrated(best, rows[0], len(steerings)), _cost(best), _more_than_a_temperature(best, steerings)]


def _better_calibrated(best: ComparedRow, neutral: ComparedRow, steerings: int) -> Finding:
    steered, unsteered = (METRICS["ece"].number(row.metrics["ece"].value) for row in (best, neutral))
    lead = f"With {_short(best.name, 120)} the ECE is {steered}, without steering {unsteered}."
    if steerings > 1:
        lead += (
            f" Of the {steerings} steerings that is the lowest ECE on this text; picked where it is judged, it looks better than "
            "it would on other text."
        )
    way = beyond(best.minus["neutral"]["ece"])
    answer = {"lower": "Yes: its ECE is lower.", "higher": "No: its ECE is higher.", None: "Not shown: no difference in ECE."}[
        way
    ]
    return Finding(
        "Does steering make it better calibrated?", answer, lead, [_against(best, "neutral", ("ece", "ece_equal_mass", "brier"))]
    )


def _cost(best: ComparedRow) -> Finding:
    worse, better = _sides(best.minus["neutral"], ("loss", "accuracy", "auroc"))
    answer = f"Worse {worse}." if worse else "Nothing that shows in loss, accuracy or AUROC."
    lead = f"{better[:1].upper() + better[1:]} {'are' if ' and ' in better else 'is'} better." if better else ""
    if "argmax_changed" in best.metrics:
        changed = METRICS["argmax_changed"].number(best.metrics["argmax_changed"].value)
        lead += f" The top prediction is another one on {changed} of the tokens."
    return Finding("What does it cost?", answer, lead, [_against(best, "neutral", ("loss", "accuracy", "auroc", "entropy"))])


def _more_than_a_temperature(best: ComparedRow, steerings: Sequence[ComparedRow]) -> Finding:
    worse, better = _sides(best.minus.get("matched temperature", {}), JUDGED)
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
    ways = [beyond(row.minus["matched temperature"]["loss"]) for row in steerings if "matched temperature" in row.minus]
    lead = ""
    if len(ways) > 1:
        lead = (
            f"Of all {len(ways)} steerings, {ways.count('lower')} have a lower loss than the temperature of their own mean "
            f"entropy, {ways.count('higher')} a higher one; of {ways.count(None)} the interval contains zero."
        )
    kinds: tuple[Kind, ...] = ("matched temperature", "temperature")
    return Finding(
        "Is it more than a temperature?", answer, lead, [_against(best, kind, JUDGED) for kind in kinds if kind in best.minus]
    )


def _sides(differences: dict[str, Interval], names: Sequence[str]) -> tuple[str, str]:
    """The metrics in which a row is worse, and those in which it is better, beyond the interval."""
    ways = {name: beyond(differences[name]) for name in names if name in differences}
    worse = [METRICS[name].label for name, way in ways.items() if way and way != METRICS[name].better]
    better = [METRICS[name].label for name, way in ways.items() if way and way == METRICS[name].better]
    return " and ".join(worse), " and ".join(better)


def _tuning_finding(tuning: Tuning) -> Finding:
    value, low, high = (f"{number:+.4f}".replace("-", "−") for number in tuning.validation)
    lead = (
        f"On the validation split its {OBJECTIVES[tuning.objective]} less neutral's is {value} ({low} to {high}), "
        "the mean over texts: "
    )
    if tuning.gained:
        return Finding("Is it fit to be saved?", "Yes.", lead + "better beyond the interval.", [])
    lead += "worse." if beyond(tuning.validation) == "higher" else "no difference beyond the interval."
    return Finding("Is it fit to be saved?", "No, it is refused.", lead, [])


def _metrics_table(rows: Sequence[ComparedRow]) -> Table:
    names = [name for name in METRICS if any(name in row.metrics for row in rows)]
    return Table(
        "All metrics",
        [METRICS[name].label for name in names],
        [TableRow(row.name, _note(row), [_cell(name, row.metrics.get(name)) for name in names]) for row in rows],
    )


def _difference_table(rows: Sequence[ComparedRow], kind: Kind) -> Table:
    """Of every row that is compared with the row of a kind."""
    compared = [row for row in rows if kind in row.minus]
    names = [name for name in COMPARED if any(name in row.minus[kind] for row in compared)]
    return Table(
        f"Difference to {AGAINST[kind]}",
        [f"Δ {METRICS[name].label}" for name in names],
        [TableRow(row.name, "", [_cell(name, row.minus[kind].get(name), difference=True) for name in names]) for row in compared],
    )


def _note(row: ComparedRow) -> str:
    """The one number of a baseline, per fold."""
    if not row.values:
        return ""
    return ("c = " if row.kind == "null write" else "T = ") + ", ".join(f"{value:.3f}" for value in row.values)


def _cell(name: str, interval: Interval | None, *, difference: bool = False) -> Cell | None:
    if interval is None:
        return None
    metric = METRICS[name]
    value, low, high = (metric.number(number, sign=difference) for number in interval)
    way = beyond(interval) if difference else None
    verdict = "" if way is None or metric.better is None else "better" if way == metric.better else "worse"
    return Cell(value, f"{low} … {high}", verdict)


def _compared_figures(all_rows: Sequence[ComparedRow], what: str) -> list[Figures]:
    """What can be drawn of any comparison: of predictions of tokens, or of answers to questions."""
    rows = plots.drawn(all_rows)
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


def _names(rows: Sequence[ComparedRow]) -> str:
    return ", ".join(_short(row.name, 60) for row in rows)


def _text_figures(text: TextComparison) -> list[Figures]:
    rows, neutral = plots.drawn(text.rows), text.rows[0]
    names = _names(rows)
    reliability, risk = _compared_figures(text.rows, "tokens")
    found = [reliability]
    dials = [dial for dial in DIALS if plots.dialled(text, dial)]
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
                        f"Change obtained against change asked of the {dial} dial, at {len(plots.dialled(text, dial))} values.",
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
        Figures(
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
        ),
    ]
    return found


def _reliability_panel(row: ComparedRow) -> Panel:
    ece, name = METRICS["ece"], _short(row.name, 60)
    value, low, high = (ece.number(number) for number in row.metrics["ece"])
    caption = f"{name}: ECE {value} ({low} to {high})"
    return _panel(partial(plots.draw_reliability, row=row), f"Reliability diagram of {caption}.", caption, size=(3.4, 3.3))


def _profile_figures(profile: Profile) -> Figures:
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
        "Entropy neurons (red) write much where the unembedding reads little: a large norm, a low logit variance, a null "
        "fraction beyond chance; and they act through the final norm: a mediation near 1. The curves are what the dials did to "
        "the text the profile was calibrated on.",
        panels,
    )


def _induction_figures(study: InductionStudy) -> Figures:
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


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
