"""Pictures of a profile, of an evaluation and of the studies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from confsteer.discovery.response import monotone_range
from confsteer.discovery.select import candidates
from confsteer.discovery.weights import WeightStatistics
from confsteer.evaluation.cumulative import CumulativeStudy
from confsteer.evaluation.harness import Evaluation
from confsteer.evaluation.induction import Curve, InductionStudy
from confsteer.profile import Profile
from confsteer.steering import DIALS

GREY, ENTROPY, FREQUENCY = "#9aa0a6", "#c5221f", "#1967d2"
"""The layer, its entropy neurons, its token-frequency neurons."""


def plot_neurons(profile: Profile, file: Path) -> None:
    """Norm against logit variance and null fraction against mediation: figures 2a and 2e of arXiv 2406.16254.

    Of a profile without a corpus, which has no mediation: null fraction against norm, and the unembedding's spectrum.
    """
    scanned = profile.corpus is None
    figure = Figure(figsize=(16.5 if scanned else 11, 4.6), layout="constrained")
    left, right, *rest = figure.subplots(1, 3 if scanned else 2)
    columns = {name: column.numpy() for name, column in profile.columns.items()}
    _scatter(left, profile, columns["norm"], columns["logit_variance"])
    left.set(xlabel="norm of the write  ‖w‖", ylabel="logit variance", title="What each neuron writes")
    # A write that is invisible to the unembedding has a variance of exactly zero.
    positive = columns["logit_variance"][columns["logit_variance"] > 0]
    left.set_yscale("symlog", linthresh=float(np.quantile(positive, 0.02)) if len(positive) else 1e-9)
    _scatter(right, profile, columns["null_fraction"], columns["norm" if scanned else "mediation"])
    right.axvline(
        profile.layer.chance_null_fraction, color="black", linewidth=0.8, linestyle=":", label="chance (luckiest of all)"
    )
    right.set_xlabel(f"null fraction  (k = {profile.layer.null_dims})")
    if scanned:
        right.set(ylabel="norm of the write  ‖w‖", title="Where it writes")
        _spectrum(rest[0], profile.weights)
    else:
        right.set(ylabel="mediation  1 − direct/total", ylim=(-1.05, 1.05), title="How it acts")
    right.legend(loc="best", fontsize=8)
    figure.suptitle(f"{profile.model.id}, layer {profile.model.layer}: {profile.model.n_neurons:,} neurons")
    figure.savefig(file, dpi=130)


def _scatter(axes: Axes, profile: Profile, x: np.ndarray, y: np.ndarray) -> None:
    axes.scatter(x, y, s=7, color=GREY, linewidths=0, label="neuron of the layer")
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
    for i in entropy[:6]:
        axes.annotate(str(i), (x[i], y[i]), fontsize=7, xytext=(4, 3), textcoords="offset points")


def _spectrum(axes: Axes, weights: WeightStatistics) -> None:
    """Singular values of the unembedding, largest first, and where its effective null space begins."""
    values = weights.singular_values.numpy()[::-1]
    axes.plot(np.arange(1, len(values) + 1), values, marker=".", markersize=3, linewidth=0.8, color=GREY)
    axes.axvspan(len(values) - weights.null_dims + 0.5, len(values) + 0.5, color=ENTROPY, alpha=0.2, label="effective null space")
    axes.set(xlabel="singular value, by size", ylabel="size", title="What the unembedding reads")
    # An exact null space has singular values of zero.
    axes.set_yscale("symlog", linthresh=float(values[0]) * 1e-4)
    axes.legend(loc="lower left", fontsize=8)


def plot_frequency_neurons(profile: Profile, file: Path) -> None:
    """How much each neuron's ablation moves the output along the unigram direction, against the share that does the loss."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.subplots()
    columns = {name: column.numpy() for name, column in profile.columns.items()}
    _scatter(axes, profile, columns["frequency"], columns["frequency_mediation"])
    axes.set(
        xscale="log",
        xlabel="mean |ΔKL(P_freq ‖ P_model)|, nats",
        ylabel="frequency mediation  1 − direct/total",
        ylim=(-1.05, 1.05),
    )
    axes.legend(fontsize=8)
    figure.suptitle(f"{profile.model.id}, layer {profile.model.layer}: {profile.model.n_neurons:,} neurons")
    figure.savefig(file, dpi=130)


def plot_response(profile: Profile, file: Path) -> None:
    """What each dial does over its reach: entropy, loss and divergence from the unigram distribution.

    Raises:
        NoNeuronsError: the profile has no dial to draw.
    """
    dials = [dial for dial in DIALS if dial in profile.response]
    if not dials:
        profile.require_neurons("entropy")
    figure = Figure(figsize=(5.5 * len(dials), 4.4), layout="constrained")
    for axes, dial in zip(figure.subplots(1, len(dials), squeeze=False)[0], dials, strict=True):
        curve, (lowest, highest) = profile.response[dial], profile.reach(dial)
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
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set(xlabel=f"{dial} dial, nats", ylabel="change, nats", title=f"{dial}: {lowest:+.2f} to {highest:+.2f} nats")
        axes.legend(fontsize=8)
    figure.suptitle(f"{profile.model.id}: response of the dials")
    figure.savefig(file, dpi=130)


def plot_reliability(evaluation: Evaluation, file: Path) -> None:
    """Confidence against accuracy on each text of an evaluation: the steerings, the unsteered model, the fitted temperature."""
    figure = Figure(figsize=(5.6 * len(evaluation.texts), 5.2), layout="constrained")
    for text, axes in zip(evaluation.texts, figure.subplots(1, len(evaluation.texts), squeeze=False)[0], strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="perfect calibration")
        for row in text.rows:
            if row.kind not in ("neutral", "steering", "temperature"):
                continue
            confidence = [b.confidence for b in row.reliability]
            accuracy = [b.accuracy.value for b in row.reliability]
            sizes = np.array([b.count for b in row.reliability]) / text.tokens
            (line,) = axes.plot(confidence, accuracy, linewidth=1, label=f"{row.name}   ECE {row.metrics['ece'].value:.3f}")
            axes.scatter(confidence, accuracy, s=8 + 300 * sizes, color=line.get_color(), alpha=0.6, linewidths=0)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence: top probability", ylabel="accuracy", aspect="equal")
        axes.set_title(f"{evaluation.model} on {text.source}\n{text.tokens:,} tokens; dots: share of tokens", fontsize=9)
        axes.legend(fontsize=8, loc="upper left")
    figure.savefig(file, dpi=130)


def plot_induction(study: InductionStudy, file: Path) -> None:
    """Entropy, loss and activations by position of repeated sequences, unsteered and with entropy neurons clipped.

    Bands are ± 1.96 standard errors over sequences. Of the clips, the strongest neuron's and that of all together are drawn;
    of the activations, those of the first eight neurons.
    """
    figure = Figure(figsize=(5.4 * len(study.kinds), 7.8), layout="constrained")
    panels = figure.subplots(3, len(study.kinds), sharex="col", squeeze=False)
    for kind, (entropy, loss, activation) in zip(study.kinds, panels.T, strict=True):
        alone = max(kind.clips[: len(kind.neurons)], key=lambda clip: abs(clip.second_entropy.nats.value))
        _band(entropy, kind.positions, kind.entropy, "unsteered", "black")
        _band(loss, kind.positions, kind.loss, "unsteered", "black")
        clips = [(alone, f"{alone.neurons[0]} clipped", FREQUENCY)]
        if len(kind.neurons) > 1:
            clips.append((kind.clips[-1], f"all {len(kind.neurons)} clipped", ENTROPY))
        for clip, label, colour in clips:
            _band(entropy, kind.positions, clip.entropy, label, colour)
            _band(loss, kind.positions, clip.loss, label, colour)
        for row, neuron in enumerate(kind.neurons[:8]):
            _band(activation, kind.positions, neuron.activation, str(neuron.index), f"C{row}")
        for axes, label in ((entropy, "entropy, nats"), (loss, "loss, nats"), (activation, "activation")):
            axes.axvline(kind.repeats_from, color=GREY, linestyle=":", linewidth=1)
            axes.set_ylabel(label)
            axes.legend(fontsize=7, ncols=2)
        activation.set_xlabel("position (dotted: the stretch is read again)")
        entropy.set_title(f"{kind.kind} ({kind.source}): {kind.sequences} sequences", fontsize=10)
    figure.suptitle(f"{study.model}: a stretch of {study.half} tokens, read twice")
    figure.savefig(file, dpi=90)


def _band(axes: Axes, x: tuple[int, ...], curve: Curve, label: str, colour: str) -> None:
    mean, error = np.array(curve.mean), np.array(curve.standard_error)
    axes.plot(x, mean, color=colour, linewidth=1, label=label)
    axes.fill_between(x, mean - 1.96 * error, mean + 1.96 * error, color=colour, alpha=0.2, linewidth=0)


def plot_cumulative(study: CumulativeStudy, file: Path) -> None:
    """Ablation of 1, 2, … entropy neurons with 95 % intervals, and of random neurons with the range over draws."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
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
        axes.legend(fontsize=8)
    figure.suptitle(f"{study.model} on {study.source}: {study.tokens:,} tokens, {len(study.draws)} draws of random neurons")
    figure.savefig(file, dpi=100)
