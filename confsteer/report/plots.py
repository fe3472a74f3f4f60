"""Pictures of a profile, of an evaluation and of the studies: panels, each drawn on axes, and figures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from confsteer.discovery.response import monotone_range
from confsteer.discovery.select import candidates
from confsteer.evaluation.comparison import COVERAGES, ENTROPY_BINS, ComparedRow, Row, TextComparison
from confsteer.evaluation.evaluate import Evaluation
from confsteer.profile.dials import dial_effect
from confsteer.profile.profile import Profile
from confsteer.report.printable import one_safe_line
from confsteer.steering import DIALS, MADE_BY_HAND, Dial, Steering
from confsteer.studies.cumulative import CumulativeStudy
from confsteer.studies.induction import InductionStudy, PositionCurve, RepeatedSequences

GREY, ENTROPY, FREQUENCY = "#9aa0a6", "#c5221f", "#1967d2"
"""The layer, its entropy neurons, its token-frequency neurons."""
STEERINGS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of steerings; no more are drawn (Okabe and Ito's, which colour-blind readers tell apart)."""
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
AnyRow = TypeVar("AnyRow", bound=ComparedRow)
Measure = Literal["entropy", "loss", "activation"]
LABELS = 6
"""Neurons with a label, at most."""


def plot_neurons(profile: Profile) -> Figure:
    """Norm against logit variance and null fraction against mediation: figures 2a and 2e of arXiv 2406.16254.

    Of a profile without a corpus, which has no mediation: null fraction against norm, and the unembedding's spectrum.
    """
    scanned = profile.corpus is None
    figure = Figure(figsize=(16.5 if scanned else 11, 4.6), dpi=130, layout="constrained")
    left, right, *rest = figure.subplots(1, 3 if scanned else 2)
    draw_writes(left, profile)
    draw_null_fraction(right, profile)
    if scanned:
        draw_spectrum(rest[0], profile)
    figure.suptitle(f"{_label(profile.model.id)}, layer {profile.model.layer}: {profile.model.n_neurons:,} neurons")
    _part_labels(figure)
    return figure


def draw_writes(axes: Axes, profile: Profile) -> None:
    """Norm of each neuron's write against the variance of its cosines with the unembedding."""
    columns = {name: column.numpy() for name, column in profile.columns.items()}
    _scatter(axes, profile, columns["norm"], columns["logit_variance"])
    axes.set(xlabel="norm of the write  ‖w‖", ylabel="logit variance", title="What each neuron writes")
    # A write that is invisible to the unembedding has a variance of exactly zero.
    positive = columns["logit_variance"][columns["logit_variance"] > 0]
    axes.set_yscale("symlog", linthresh=float(np.quantile(positive, 0.02)) if len(positive) else 1e-9)


def draw_null_fraction(axes: Axes, profile: Profile) -> None:
    """Null fraction of each neuron's write against its mediation (of a profile without a corpus: against its norm)."""
    scanned = profile.corpus is None
    columns = {name: column.numpy() for name, column in profile.columns.items()}
    _scatter(axes, profile, columns["null_fraction"], columns["norm" if scanned else "mediation"])
    chance = profile.layer.chance_null_fraction
    axes.axvline(chance, color="black", linewidth=0.8, linestyle=":", label="chance (luckiest of all)")
    axes.set_xlabel(f"null fraction  (k = {profile.layer.null_dims})")
    if scanned:
        axes.set(ylabel="norm of the write  ‖w‖", title="Where it writes")
    else:
        axes.set(ylabel="mediation  1 − direct/total", ylim=(-1.05, 1.05), title="How it acts")
    axes.legend(loc="best", fontsize="small")


def _scatter(axes: Axes, profile: Profile, x: np.ndarray, y: np.ndarray) -> None:
    # Thousands of dots would be most of a vector picture.
    axes.scatter(x, y, s=7, color=GREY, linewidths=0, label="neuron of the layer", rasterized=True)
    entropy = [neuron.index for neuron in profile.entropy_neurons]
    frequency = [neuron.index for neuron in profile.frequency_neurons]
    if profile.corpus is None:
        entropy = candidates(profile.weights)
    kinds = (
        (entropy, ENTROPY, "candidate" if profile.corpus is None else "entropy neuron"),
        (frequency, FREQUENCY, "token-frequency neuron"),
    )
    for index, colour, label in kinds:
        if index:
            axes.scatter(x[index], y[index], s=30, color=colour, label=label, zorder=3)
    for i in entropy[:LABELS]:
        axes.annotate(str(profile.model.key(i)), (x[i], y[i]), fontsize="x-small", xytext=(4, 3), textcoords="offset points")


def _part_labels(figure: Figure) -> None:
    """Move labels of neurons that lie on each other below one another."""
    figure.draw_without_rendering()  # places are known only after the layout
    for axes in figure.axes:
        placed: list[Bbox] = []
        for label in (text for text in axes.texts if isinstance(text, Annotation)):
            while any(label.get_window_extent().overlaps(other) for other in placed):
                right, up = label.xyann
                label.xyann = right, up - 1
            placed.append(label.get_window_extent())


def draw_spectrum(axes: Axes, profile: Profile) -> None:
    """Singular values of the unembedding, largest first, and where its effective null space begins."""
    values, null_dims = profile.weights.singular_values.numpy()[::-1], profile.weights.null_dims
    axes.plot(np.arange(1, len(values) + 1), values, marker=".", markersize=3, linewidth=0.8, color=GREY)
    axes.axvspan(len(values) - null_dims + 0.5, len(values) + 0.5, color=ENTROPY, alpha=0.2, label="effective null space")
    axes.set(xlabel="singular value, by size", ylabel="size", title="What the unembedding reads")
    # An exact null space has singular values of zero.
    axes.set_yscale("symlog", linthresh=float(values[0]) * 1e-4 or 1e-9)
    axes.legend(loc="lower left", fontsize="small")


def plot_frequency_neurons(profile: Profile) -> Figure:
    """How much each neuron's ablation moves the output along the unigram direction, against the share that does the loss."""
    figure = Figure(figsize=(6, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    columns = {name: column.numpy() for name, column in profile.columns.items()}
    _scatter(axes, profile, columns["frequency"], columns["frequency_mediation"])
    axes.set(
        xscale="log",
        xlabel="mean |ΔKL(P_freq ‖ P_model)|, nats",
        ylabel="frequency mediation  1 − direct/total",
        ylim=(-1.05, 1.05),
    )
    axes.legend(fontsize="small")
    figure.suptitle(f"{_label(profile.model.id)}, layer {profile.model.layer}: {profile.model.n_neurons:,} neurons")
    _part_labels(figure)
    return figure


def plot_response(profile: Profile) -> Figure:
    """Draw what each dial does over its reach.

    Raises:
        NoNeuronsError: the profile has no dial to draw.
    """
    dials = [dial for dial in DIALS if dial in profile.response]
    if not dials:
        profile.require_neurons("entropy")
    figure = Figure(figsize=(5.5 * len(dials), 4.4), dpi=130, layout="constrained")
    for axes, dial in zip(figure.subplots(1, len(dials), squeeze=False)[0], dials, strict=True):
        draw_response(axes, profile, dial)
    figure.suptitle(f"{_label(profile.model.id)}: response of the dials")
    return figure


def draw_response(axes: Axes, profile: Profile, dial: Dial) -> None:
    """Draw what a dial does over its reach: entropy, loss and divergence from the unigram distribution.

    The band is the range of the dial's own quantity over texts, where there are several. Above stand the temperatures that it
    amounts to.
    """
    curve, (lowest, highest) = profile.require_neurons(dial), profile.reach(dial)
    change = np.array(curve.change(dial))
    first, last = monotone_range(change.tolist(), curve.zero)
    inside = slice(first, last + 1)
    for values, label in (
        (curve.entropy, "entropy"),
        (curve.loss, "loss"),
        (curve.kl_model_unigram, "KL(P_model ‖ P_freq)"),
    ):
        delta = np.array(values) - values[curve.zero]
        axes.plot(change[inside], delta[inside], marker=".", label=label)
    if profile.responses_by_text:
        own = np.array([curves[dial].change(dial) for curves in profile.responses_by_text.values()])
        band = (own if dial == "entropy" else -own)[:, inside]
        colour = axes.lines[0 if dial == "entropy" else 2].get_color()
        label = f"range over {len(own)} texts"
        axes.fill_between(change[inside], band.min(axis=0), band.max(axis=0), color=colour, alpha=0.2, linewidth=0, label=label)
    marked = [dial_effect(profile, dial, asked) for asked in np.linspace(lowest, highest, 5).tolist()]
    if marked := [effect for effect in marked if effect.temperature is not None]:
        above = axes.secondary_xaxis("top")
        above.set_xticks([effect.asked for effect in marked], [f"{effect.temperature:.2f}" for effect in marked])
        above.set_xlabel("as a temperature")
    _cross(axes)
    by_hand = f" ({MADE_BY_HAND})" if profile.turns_direction(dial) else ""
    axes.set(xlabel=f"{dial} dial, nats", ylabel="change, nats", title=f"{dial}{by_hand}: {lowest:+.2f} to {highest:+.2f} nats")
    axes.legend(fontsize="small")


def plot_reliability(evaluation: Evaluation) -> Figure:
    """Reliability diagrams of each text, four in a row."""
    shown = [rows_to_draw(text.rows) for text in evaluation.texts]
    across = min(4, max(map(len, shown)))
    down = [-(-len(rows) // across) for rows in shown]
    figure = Figure(figsize=(3.2 * across, 3.6 * sum(down) + 0.6), dpi=130, layout="constrained")
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=down)[:, 0]
    for text, rows, number, part in zip(evaluation.texts, shown, down, parts, strict=True):
        panels = part.subplots(number, across, squeeze=False).ravel()
        for row, axes in zip(rows, panels, strict=False):
            draw_reliability(axes, row)
            axes.set_title(f"{_label(row.name)}\nECE {row.metrics['ece'].value:.4f}", fontsize="medium")
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        part.suptitle(f"{_label(text.source)}: {text.tokens:,} tokens", fontsize="large")
    figure.suptitle(f"{_label(evaluation.model)}: dots as large as their share of tokens, bands are 95 % intervals")
    return figure


def rows_to_draw(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """The rows worth a picture: neutral, fitted temperature, and the steerings.

    Of more than six steerings four spread over their order are drawn, and those of the lowest loss and of the lowest ECE.
    """
    steerings = [row for row in rows if row.kind == "steering"]
    if len(steerings) > len(STEERINGS):
        chosen = set(np.linspace(0, len(steerings) - 1, len(STEERINGS) - 2).round().astype(int).tolist())
        for metric in ("loss", "ece"):
            # Confidences in written answers have no loss.
            having = [i for i, row in enumerate(steerings) if metric in row.metrics]
            chosen |= {min(having, key=lambda i: steerings[i].metrics[metric].value)} if having else set()
        steerings = [steerings[i] for i in sorted(chosen)]
    return [row for row in rows if row.kind in ("neutral", "temperature")] + steerings


def draw_reliability(axes: Axes, row: ComparedRow) -> None:
    """Accuracy against confidence by bin, dots as large as their share of tokens, with a band of 95 % intervals."""
    bins = row.reliability
    confidence, accuracy = np.array([b.confidence for b in bins]), np.array([b.accuracy for b in bins])
    value, low, high = accuracy.T
    share = np.array([b.count for b in bins]) / sum(b.count for b in bins)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    axes.fill_between(confidence, low, high, color=ENTROPY, alpha=0.18, linewidth=0)
    axes.plot(confidence, value, color=ENTROPY, linewidth=1)
    axes.scatter(confidence, value, s=6 + 240 * share, color=ENTROPY, alpha=0.7, linewidths=0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")


def single_dial_rows(text: TextComparison, dial: Dial) -> list[tuple[float, Row]]:
    """Rows whose steering is one dial and nothing else, with what was asked of it, in that order."""
    rows = [(getattr(row.steering, dial), row) for row in text.of_kind("steering")]
    found = [(asked, row) for asked, row in rows if asked is not None and row.steering == Steering.model_validate({dial: asked})]
    return sorted(found, key=lambda pair: pair[0])


def draw_obtained(axes: Axes, text: TextComparison, dial: Dial) -> None:
    """Draw what was asked of a dial against what the text shows, with 95 % intervals where the differences are paired."""
    found = single_dial_rows(text, dial)
    asked = [value for value, _ in found]
    if dial == "entropy":
        change = np.array([row.minus["neutral"]["entropy"] for _, row in found])
        value, low, high = change.T
        axes.errorbar(asked, value, (value - low, high - value), color=ENTROPY, marker="o", markersize=4, capsize=2, linewidth=1)
    else:
        before = text.rows[0].metrics["kl_model_unigram"].value
        closer = [before - row.metrics["kl_model_unigram"].value for _, row in found]
        axes.plot(asked, closer, color=FREQUENCY, marker="o", markersize=4, linewidth=1)
    _cross(axes)
    # Through the origin with a slope of one, however far the axes reach.
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle=":")
    obtained = "Δentropy, nats" if dial == "entropy" else "KL closer, nats"
    axes.set(xlabel=f"asked: {dial}, nats", ylabel=f"obtained: {obtained}")


def _cross(axes: Axes) -> None:
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)


def draw_risk(axes: Axes, rows: Sequence[ComparedRow]) -> None:
    """Share of wrong predictions among the most confident."""
    for row, style in _styles(rows):
        axes.plot(COVERAGES, [1 - accuracy for accuracy in row.coverage], **style)
    axes.set(xlim=(0, 1), xlabel="coverage: share answered, surest first", ylabel="risk: share of them wrong")


def draw_entropies(axes: Axes, rows: Sequence[Row], vocab_size: int) -> None:
    """How the entropies of the predictions are distributed."""
    edges = np.linspace(0, np.log(vocab_size), ENTROPY_BINS + 1)
    for row, style in _styles(rows):
        axes.stairs(row.entropies, edges, **style)
    axes.set(xlim=(0, edges[-1]), xlabel="entropy of a prediction, nats", ylabel="share of tokens")


def draw_by_frequency(
    axes: Axes, rows: Sequence[Row], measure: Literal["loss", "confidence"], *, minus: Row | None = None
) -> None:
    """A mean of the tokens that came, by how frequent they are; less that of the row `minus`.

    With the confidences the accuracy of the first row is drawn.
    """
    tenths = np.arange(1, len(rows[0].frequency) + 1)
    for row, style in _styles(rows):
        values = np.array([getattr(group, measure) for group in row.frequency])
        if minus is not None:
            values = values - [getattr(group, measure) for group in minus.frequency]
        axes.plot(tenths, values, marker=".", **style)
    if measure == "confidence":
        accuracy = [group.accuracy for group in rows[0].frequency]
        axes.plot(
            tenths, accuracy, color="black", linewidth=1, linestyle=":", marker="x", markersize=4, label="accuracy, neutral"
        )
    axes.set(xticks=tenths[:: 1 if len(tenths) <= 10 else 2], xlabel="tenth of the tokens: rarest to most frequent")
    axes.set_ylabel(f"{measure}{' less neutral' if minus else ''}{', nats' if measure == 'loss' else ''}")


def _styles(rows: Sequence[AnyRow]) -> list[tuple[AnyRow, dict[str, Any]]]:
    """A line for each row: neutral black, the temperature grey, steerings in colours."""
    steerings = [row for row in rows if row.kind == "steering"]
    styles = []
    for row in rows:
        if row.kind == "steering":
            i = steerings.index(row) % len(STEERINGS)
            colour, line, width = STEERINGS[i], LINES[i], 1.4
        else:
            colour, line, width = ("black", "-", 1.6) if row.kind == "neutral" else (GREY, "-", 1.6)
        styles.append((row, {"color": colour, "linestyle": line, "linewidth": width, "label": _label(row.name)}))
    return styles


def _label(name: str) -> str:
    """A name as it can stand in a picture: short, on one line, and with dollar signs that begin no formula."""
    short = name if len(name) <= 36 else name[:35] + "…"
    return one_safe_line(short).replace("$", r"\$")


def plot_induction(study: InductionStudy) -> Figure:
    """Entropy, loss and activations by position of repeated sequences, unsteered and with entropy neurons clipped."""
    figure = Figure(figsize=(5.4 * len(study.kinds), 7.8), dpi=90, layout="constrained")
    panels = figure.subplots(3, len(study.kinds), sharex="col", squeeze=False)
    measures: tuple[Measure, ...] = ("entropy", "loss", "activation")
    for kind, column in zip(study.kinds, panels.T, strict=True):
        for axes, measure in zip(column, measures, strict=True):
            draw_repetition(axes, kind, measure)
        for axes in column[:-1]:
            axes.set_xlabel("")
        column[0].set_title(f"{kind.kind} ({_label(kind.source)}): {kind.sequences} sequences", fontsize=10)
    figure.suptitle(f"{_label(study.model)}: a stretch of {study.half} tokens, read twice")
    return figure


def draw_repetition(axes: Axes, kind: RepeatedSequences, measure: Measure) -> None:
    """A mean by position, with bands of ± 1.96 standard errors over sequences.

    Of the clips, the strongest neuron's and that of all together are drawn; of the activations, those of the first eight neurons.
    """
    if measure == "activation":
        for row, neuron in enumerate(kind.neurons[:8]):
            _band(axes, kind.positions, neuron.activation, str(neuron.index), f"C{row}")
    else:
        _band(axes, kind.positions, getattr(kind, measure), "unsteered", "black")
        alone = max(kind.clips[: len(kind.neurons)], key=lambda clip: abs(clip.second_entropy.nats.value))
        clips = [(alone, f"{alone.neurons[0]} clipped", FREQUENCY)]
        if len(kind.neurons) > 1:
            clips.append((kind.clips[-1], f"all {len(kind.neurons)} clipped", ENTROPY))
        for clip, label, colour in clips:
            _band(axes, kind.positions, getattr(clip, measure), label, colour)
    axes.axvline(kind.repeats_from, color=GREY, linestyle=":", linewidth=1)
    axes.set(
        xlabel="position (dotted: the stretch is read again)", ylabel=measure + ("" if measure == "activation" else ", nats")
    )
    axes.legend(fontsize="small", ncols=2)


def _band(axes: Axes, x: tuple[int, ...], curve: PositionCurve, label: str, colour: str) -> None:
    mean, error = np.array(curve.mean), np.array(curve.standard_error)
    axes.plot(x, mean, color=colour, linewidth=1, label=label)
    axes.fill_between(x, mean - 1.96 * error, mean + 1.96 * error, color=colour, alpha=0.2, linewidth=0)


def plot_cumulative(study: CumulativeStudy) -> Figure:
    """Ablation of 1, 2, … entropy neurons with 95 % intervals, and of random neurons with the range over draws."""
    figure = Figure(figsize=(9, 6.4), dpi=100, layout="constrained")
    steps = study.steps
    number = [len(step.neurons) for step in steps]
    measured = (
        ("mean Δentropy, nats", [step.entropy.nats for step in steps], [step.controls.entropy for step in steps]),
        ("mean |Δentropy|, nats", [step.entropy_abs for step in steps], [step.controls.entropy_abs for step in steps]),
        ("mean Δloss, nats", [step.loss.nats for step in steps], [step.controls.loss for step in steps]),
        ("mean |Δloss|, nats", [step.loss_abs for step in steps], [step.controls.loss_abs for step in steps]),
    )
    for axes, (label, ours, controls) in zip(figure.subplots(2, 2).flat, measured, strict=True):
        kinds = ((ours, "entropy neurons (95 % interval)", ENTROPY), (controls, "random neurons (all draws)", GREY))
        for intervals, name, colour in kinds:
            value, low, high = np.array(intervals).T
            axes.errorbar(number, value, (value - low, high - value), color=colour, marker="o", capsize=3, label=name)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="neurons set to their means", ylabel=label, xticks=number)
        axes.legend(fontsize="small")
    where = f"{_label(study.model)} on {_label(study.source)}"
    figure.suptitle(f"{where}: {study.tokens:,} tokens, {len(study.draws)} draws of random neurons")
    return figure
