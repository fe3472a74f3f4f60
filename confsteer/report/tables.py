"""Tables that the command line prints: of profiles, scans, evaluations and studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.console import Console
from rich.table import Table

from confsteer.errors import ProfileError
from confsteer.report.printable import one_safe_line
from confsteer.steering import DIALS, MADE_BY_HAND, Dial, Steering

if TYPE_CHECKING:
    from confsteer.calibration.published import PublishedModel
    from confsteer.evaluation.comparison import ComparedRow, TextComparison
    from confsteer.evaluation.evaluate import Evaluation
    from confsteer.profile.dials import DialEffect
    from confsteer.profile.profile import Profile
    from confsteer.profile.schema import ModelIdentity, Neuron
    from confsteer.results.bootstrap import Interval
    from confsteer.studies.cumulative import CumulativeStudy
    from confsteer.studies.induction import InductionStudy
    from confsteer.tuning.tune import Tuning

MAX_NAME_CHARACTERS = 40
"""Characters of a steering in a table: one that sets every neuron has thousands."""


def console() -> Console:
    """Tables need room: a pipe or a file, which has no width of its own, gets enough."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def escape(text: str) -> str:
    """A string that is shown as it is, whatever rich or the terminal would take it for."""
    return markup.escape(one_safe_line(text))


def print_profile(console: Console, profile: Profile) -> None:
    """Neurons and dials of a profile, or the candidates of a scan."""
    from confsteer.profile.dials import example_effects

    model, corpus, layer = profile.model, profile.corpus, profile.layer
    if corpus is None:
        _print_scan(console, profile)
        return
    console.print(
        f"[bold]{escape(model.id)}[/bold] ({escape(model.model_type)}), layer {model.layer}: {_count(model)}, "
        f"{corpus.kept_tokens:,} tokens in {corpus.windows} windows of {escape(corpus.source)}. Unsteered: entropy "
        f"{layer.entropy:.3f}, loss {layer.loss:.3f} nats."
    )
    for dial in DIALS:
        neurons = profile.neurons(dial)
        kind = DIALS[dial].neurons.capitalize()
        if profile.turns_direction(dial):
            _print_null_direction(console, profile)
            if neurons:
                console.print(_neuron_table(f"{kind} neurons (found, but not on the {dial} dial)", neurons, dial))
                continue
        if not neurons:
            console.print(f"[bold]{kind} neurons: none found.[/bold]")
            continue
        if dial not in profile.response:
            console.print(_neuron_table(f"{kind} neurons (none has a clear sign: no {dial} dial)", neurons, dial))
            continue
        low, high = profile.reach(dial)
        console.print(_neuron_table(f"{kind} neurons ({dial} dial: {low:+.2f} to {high:+.2f} nats)", neurons, dial))
        print_dial_effects(console, {dial: example_effects(profile, dial)})
    if layer.other_null_spaces:
        console.print(_null_space_sentence(profile))
    for name, steering in profile.presets.items():
        console.print(f"Preset {escape(name)}: {escape(str(steering))}")
    console.print(
        f"Null fraction: {layer.null_dims} of {model.d_model} directions; the luckiest of {model.n_neurons:,} random writes "
        f"exceeds {layer.chance_null_fraction:.3f} 1 time in 20, and a cosine with unigram of "
        f"{layer.chance_frequency_cosine:.3f}. Effects: neuron set to its mean, nats, ± standard error over windows."
    )
    if model.experts is not None:
        console.print(
            "Neurons are EXPERT.NUMBER, active on the tokens that the router sends to the expert (tokens); other effects are "
            "means over all tokens."
        )


def _count(model: ModelIdentity) -> str:
    experts = "" if model.experts is None else f" ({model.experts})"
    return f"{model.n_neurons:,} neurons{experts}"


def _print_null_direction(console: Console, profile: Profile) -> None:
    """Say of the entropy dial that no neurons are on it, and what it does."""
    from confsteer.profile.dials import example_effects

    low, high = profile.reach("entropy")
    console.print(
        f"[bold]{MADE_BY_HAND.capitalize()}[/bold] (entropy dial: {low:+.2f} to {high:+.2f} nats). {profile.null_direction}"
    )
    print_dial_effects(console, {"entropy": example_effects(profile, "entropy")})


def print_dial_effects(console: Console, effects: Mapping[Dial, Sequence[DialEffect]]) -> None:
    """Say of each setting of a dial how far apart the calibration texts lie, and which temperature it amounts to.

    Nothing where the profile does not know.
    """
    for dial, settings in effects.items():
        for effect in settings:
            if known := str(effect):
                console.print(f"{dial} {effect.asked:+.3f}: {known}")


def steered_dials(profile: Profile, steerings: Iterable[Steering]) -> dict[Dial, list[DialEffect]]:
    """Gather the settings of each dial that several steerings turn, each once, for `print_dial_effects`."""
    from confsteer.profile.dials import steering_effects

    found: dict[Dial, dict[DialEffect, None]] = {}
    for steering in steerings:
        for dial, effect in steering_effects(profile, steering).items():
            found.setdefault(dial, {})[effect] = None
    return {dial: list(effects) for dial, effects in found.items()}


CLEAR_CLIFF = 2.0
"""From this ratio on a singular value beyond the null space is far from those within."""


def _null_space_sentence(profile: Profile) -> str:
    """How clear the null space is, and what the selection is with half and with twice as many directions."""
    layer, found = profile.layer, {neuron.index for neuron in profile.entropy_neurons}
    if layer.cliff is None:
        cliff = "The null space is exact"
    elif layer.cliff >= CLEAR_CLIFF:
        cliff = f"The null space ends at a cliff: the next singular value is {layer.cliff:.3g} times as large"
    else:
        cliff = f"The null space has no clear end: the next singular value is {layer.cliff:.3g} times as large"
    others = []
    for other in layer.other_null_spaces:
        more, fewer = sorted({*other.entropy_neurons} - found), sorted(found - {*other.entropy_neurons})
        changes = [
            f"{sign}{', '.join(str(profile.model.key(i)) for i in neurons)}"
            for sign, neurons in (("also ", more), ("not ", fewer))
            if neurons
        ]
        others.append(f"with {other.null_dims}, {' and '.join(changes) or 'the same'}")
    return f"{cliff}. Entropy neurons: {'; '.join(others)}."


def print_near_misses(console: Console, profile: Profile) -> None:
    """Neurons that lack one thing only, and what.

    Raises:
        ProfileError: the profile does not have what this needs.
    """
    from confsteer.discovery.select import near_misses, percentile

    effects, chance = profile.effects, profile.layer.chance_frequency_cosine
    if effects is None or chance is None:
        raise ProfileError(
            f"the profile of {profile.model.id} does not have the effects of all neurons: confsteer calibrate makes one that has"
        )
    weights, cosine = profile.weights, profile.columns["frequency_cosine"]
    variance = percentile(weights.logit_variance)
    for kind, effect, share, misses in zip(
        ("entropy", "token-frequency"),
        (effects.entropy_abs, effects.frequency),
        (effects.norm_share, effects.frequency_mediation),
        near_misses(weights, effects, cosine, chance),
        strict=True,
    ):
        table = Table(title=f"Not {kind} neurons for one thing only, the largest effects first", title_justify="left")
        for name in ("neuron", "null fraction", "logit var %ile", "cosine", "effect", "share", "tokens"):
            table.add_column(name, justify="right")
        table.add_column("lacks")
        for i, lacks in misses:
            table.add_row(
                f"{profile.model.layer}.{profile.model.key(i)}",
                f"{weights.null_fraction[i]:.3f}",
                f"{variance[i]:.1f}",
                f"{cosine[i]:+.3f}",
                f"{effect.value[i]:.4f} ±{effect.standard_error[i]:.4f}",
                f"{share.value[i]:.3f} ±{share.standard_error[i]:.3f}",
                f"{profile.columns['effect_tokens'][i]:,.0f}",
                lacks,
            )
        console.print(table if misses else f"No neuron lacks one thing only to be a {kind} neuron.")


def _print_scan(console: Console, profile: Profile) -> None:
    from confsteer.discovery.select import candidates, percentile

    model, weights = profile.model, profile.weights
    console.print(
        f"[bold]{escape(model.id)}[/bold] ({escape(model.model_type)}), layer {model.layer}: {_count(model)}, "
        "scanned by their weights alone."
    )
    values, k = weights.singular_values, weights.null_dims
    console.print(
        f"Spectrum of W_U: {k} of {len(values):,} singular values count as its effective null space, up to {values[k - 1]:.4g}; "
        f"the next is {values[k]:.4g}, the largest {values[-1]:.4g}."
    )
    if found := candidates(weights):
        table = Table(title="Candidates for entropy neurons, the longest write into the null space first", title_justify="left")
        for name in ("neuron", "norm", "norm %ile", "logit variance", "logit var %ile", "null fraction", "of chance"):
            table.add_column(name, justify="right")
        norm_percentile, variance_percentile = percentile(weights.norm), percentile(weights.logit_variance)
        for i in found:
            table.add_row(
                f"{model.layer}.{model.key(i)}",
                f"{weights.norm[i]:.3f}",
                f"{norm_percentile[i]:.1f}",
                f"{weights.logit_variance[i]:.2e}",
                f"{variance_percentile[i]:.1f}",
                f"{weights.null_fraction[i]:.3f}",
                f"{weights.null_fraction[i] / weights.chance_null_fraction:.2f}×",
            )
        console.print(table)
    else:
        console.print("[bold]Candidates for entropy neurons: none found.[/bold]")
    console.print(
        f"Null fraction: the luckiest of {model.n_neurons:,} random writes exceeds {weights.chance_null_fraction:.3f} 1 time in "
        "20. Where the last layer is was read off the model's structure; calibrate checks that numerically, measures what the "
        "neurons do, and finds token-frequency neurons too."
    )


def print_agreement(console: Console, profile: Profile, known: PublishedModel) -> None:
    """Published neurons with what the scan says of each, then how many of each list are candidates."""
    from confsteer.calibration.published import agreement
    from confsteer.discovery.select import candidates, percentile

    lists, weights = agreement(profile, known), profile.weights
    ranks = {neuron: rank for rank, neuron in enumerate(candidates(weights), start=1)}
    theirs = {i: value for one in lists for i, value in one.published.null_fraction.items()}
    given = ["published"] if theirs else []
    table = Table(title=f"Published neurons of {known.id}", title_justify="left")
    for name in ("neuron", "lists", "candidate", "null fraction", *given, "norm %ile", "logit var %ile"):
        table.add_column(name, justify="right")
    norm, variance = percentile(weights.norm), percentile(weights.logit_variance)
    for i in dict.fromkeys(i for one in lists for i in one.published.neurons):
        table.add_row(
            f"{known.layer}.{i}",
            ", ".join(str(number) for number, one in enumerate(lists, start=1) if i in one.published.neurons),
            f"{ranks[i]} of {len(ranks)}" if i in ranks else "no",
            f"{weights.null_fraction[i]:.3f}",
            *(f"{theirs[i]:.3f}" if i in theirs else "" for _ in given),
            f"{norm[i]:.1f}",
            f"{variance[i]:.1f}",
        )
    if table.rows:
        console.print(table)
    kinds = {"entropy": "Entropy neurons", "null fraction": "Largest null fractions", "logit variance": "Least logit variances"}
    for number, (one, found, by_chance) in enumerate(lists, start=1):
        note = f" ({one.note})" if one.note else ""
        among = f"{len(found)} of {len(one.neurons)} are among the {len(ranks)} candidates, by chance {by_chance:.2f} would be"
        console.print(f"{number}. {kinds[one.kind]}, {escape(one.source)}{note}: {among if one.neurons else 'none'}.")


def _neuron_table(title: str, neurons: tuple[Neuron, ...], dial: str) -> Table:
    def measured(value: Any) -> str:
        error = "" if value.standard_error is None else f" ±{value.standard_error:.4f}"
        return f"{value.value:.4f}{error}"

    table = Table(title=title, title_justify="left")
    for name in ("neuron", "sign", "norm %ile", "logit var %ile", "null fraction"):
        table.add_column(name, justify="right")
    if dial == "entropy":
        columns = ["through norm", "mediation", "|Δentropy|", "|Δloss|", "argmax changed"]
    else:
        columns = ["via unigram", "|ΔKL|", "|Δloss|", "cosine with unigram"]
    for name in columns:
        table.add_column(name, justify="right")
    routed = any(n.active is not None for n in neurons)
    if routed:
        table.add_column("tokens", justify="right")
        table.add_column("|Δentropy| on these" if dial == "entropy" else "|ΔKL| on these", justify="right")
    capped = any(n.total_effect_uncapped is not None for n in neurons)
    if capped:
        table.add_column("|Δloss| before softcap", justify="right")
    for n in neurons:
        if dial == "entropy":
            effects: list[str] = [
                "" if n.norm_share is None else measured(n.norm_share),
                measured(n.mediation),
                measured(n.entropy_effect_abs),
                measured(n.total_effect),
                f"{n.argmax_changed:.2%}",
            ]
        else:
            effects = [
                measured(n.frequency_mediation),
                measured(n.frequency_effect),
                measured(n.total_effect),
                f"{n.frequency_cosine:+.3f}",
            ]
        table.add_row(
            f"{n.layer}.{n.key}",
            f"{n.sign:+d}" if n.sign else "none",
            f"{n.norm_percentile:.1f}",
            f"{n.logit_variance_percentile:.1f}",
            f"{n.null_fraction:.3f}",
            *effects,
            *(_where_active(n, dial) if routed else []),
            *([measured(n.total_effect_uncapped)] if capped else []),
        )
    return table


def _where_active(neuron: Neuron, dial: str) -> list[str]:
    """Share of the tokens that are routed to a neuron, and its effect on these."""
    effect = neuron.entropy_effect_abs if dial == "entropy" else neuron.frequency_effect
    share = neuron.active or 0.0
    return [f"{share:.1%}", f"{effect.value / share:.4f}" if share else ""]


def print_evaluation(console: Console, result: Evaluation) -> None:
    """Steerings compared on each text."""
    for text in result.texts:
        _print_comparison(console, text)
    console.print(
        f"{escape(result.name)}. Nats; ECE of the top prediction, 15 bins; ± half of the 95 % bootstrap interval, in brackets "
        "the interval of the paired difference. Matched temperature: the one that gives the unsteered model the same mean "
        "entropy. Baselines are fitted on one half of a text and used on the other. Min-p and top-p are "
        "no baselines: they cut the distribution they sample from, and give what they cut no probability at all."
    )


def print_tuning(console: Console, result: Tuning) -> None:
    """Print what tuning found, on the part of each text that it did not see."""
    for text in result.texts:
        _print_comparison(console, text, "test split")
    for text in result.left_out:
        _print_comparison(console, text, "test split; everything fitted on the other texts")
    temperature = "" if result.temperature is None else f", sampled at temperature {result.temperature:.3f}"
    low, high = result.validation.low, result.validation.high
    console.print(
        f"Tuned: {escape(str(result.steering))}{temperature}",
        f"{escape(result.name)}: {result.parameters} tuned for {result.objective} on {result.tokens['train']:,} tokens, "
        f"{result.steps} steps, {result.seconds:.0f} s. On the validation split, {result.tokens['validation']:,} tokens, it "
        f"changes {result.objective} by {result.validation.value:+.4f} ({low:+.4f} … {high:+.4f}). Nats; ± half of the 95 % "
        "bootstrap interval, in brackets the interval of the paired difference. Matched temperature: the one that gives the "
        "unsteered model the same mean entropy.",
        sep="\n",
    )


def _print_comparison(console: Console, text: TextComparison, part: str = "") -> None:
    """Print ways to predict one text; matched temperatures are a column beside their steering."""
    from confsteer.evaluation.metrics import METRICS

    title = f"{text.source}{f' ({part})' if part else ''}: {text.tokens:,} tokens in {text.windows} windows"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("", no_wrap=True)
    loss, entropy, *others = (METRICS[name].heading for name in ("loss", "entropy", "ece", "brier", "accuracy", "argmax_changed"))
    for heading in (loss, entropy, f"Δ{entropy}", *others):
        table.add_column(heading, justify="right")
    table.add_column("Δloss to matched temperature", justify="right")
    table.add_column("ΔECE to it", justify="right")
    unsteered = text.rows[0].metrics["entropy"].value
    for row in text.rows:
        if row.kind == "matched temperature":
            continue
        m, matched = row.metrics, row.minus.get("matched temperature", {})
        table.add_row(
            _with_values(row),
            with_half_width(m["loss"], 3),
            f"{m['entropy'].value:.3f}",
            f"{m['entropy'].value - unsteered:+.3f}",
            with_half_width(m["ece"], 4),
            *(f"{m[name].value:.4f}" for name in ("brier", "accuracy")),
            f"{m['argmax_changed'].value:.1%}",
            *(with_range(matched[name]) if matched else "" for name in ("loss", "ece")),
            end_section=row.kind == "null write",
        )
    console.print(table, f"Intervals over {text.blocks} {text.unit}.", sep="\n")


def print_induction(console: Console, result: InductionStudy) -> None:
    """Repeated sequences, and what clipping does to them."""
    for kind in result.kinds:
        table = Table("clipped")
        for name in ("1st mean", "2nd mean", "from", "Δentropy", "in %", "Δloss", "Δentropy at 1st"):
            table.add_column(name, justify="right")
        bounds: dict[tuple[int, ...], tuple[str, str, str]] = {
            (n.index,): (f"{n.first_mean:.3f}", f"{n.second_mean:.3f}", n.clipped_from) for n in kind.neurons
        }
        for clip in kind.clips:
            table.add_row(
                str(clip.neurons[0]) if len(clip.neurons) == 1 else "all",
                *bounds.get(clip.neurons, ("", "", "")),
                with_range(clip.second_entropy.nats),
                f"{clip.second_entropy.relative.value:+.1%}",
                with_range(clip.second_loss.nats),
                with_range(clip.first_entropy.nats),
            )
        console.print(
            f"[bold]{kind.kind.capitalize()}[/bold] ({escape(kind.source)}), {kind.sequences} stretches of {result.half} tokens. "
            f"First reading: entropy {with_half_width(kind.first.entropy, 3)}, loss {with_half_width(kind.first.loss, 3)}; "
            f"second: {with_half_width(kind.second.entropy, 3)}, {with_half_width(kind.second.loss, 3)}.",
            table,
            sep="\n",
        )
    console.print(
        f"{escape(result.model)}. Nats; ± half of the 95 % bootstrap interval over sequences, in brackets the interval of the "
        "paired difference; changes are of the second reading unless said otherwise."
    )


def print_cumulative(console: Console, result: CumulativeStudy) -> None:
    """Entropy neurons ablated together, beside random ones."""
    table = Table("ablated")
    for name in ("norm", "Δentropy", "in %", "|Δentropy|", "Δloss", "|Δloss|"):
        table.add_column(name, justify="right")
    for step in result.steps:
        number, controls = len(step.neurons), step.controls
        table.add_row(
            f"{'' if number == 1 else '+ '}{step.neurons[-1]}",
            f"{step.mean_norm:.2f}",
            with_range(step.entropy.nats),
            f"{step.entropy.relative.value:+.2%}",
            with_range(step.entropy_abs, sign=""),
            with_range(step.loss.nats),
            with_range(step.loss_abs, sign=""),
        )
        table.add_row(
            f"{number} random",
            f"{controls.mean_norm:.2f}",
            with_range(controls.entropy),
            "",
            with_range(controls.entropy_abs, sign=""),
            with_range(controls.loss),
            with_range(controls.loss_abs, sign=""),
            style="dim",
            end_section=True,
        )
    console.print(table)
    console.print(
        f"{escape(result.model)} on {escape(result.source)}: {result.tokens:,} tokens in {result.windows} windows; unsteered "
        f"entropy {with_half_width(result.entropy, 3)}, loss {with_half_width(result.loss, 3)}. Nats; 95 % bootstrap intervals "
        f"over windows; random: mean, lowest and highest of {len(result.draws)} draws. Norm: mean of the writes."
    )


def _with_values(row: ComparedRow) -> str:
    """The name of a row, and its temperatures or constants."""
    values = ", ".join(f"{value:.3f}" for value in row.values)
    return short_name(row.name) + (f" ({values})" if values else "")


def short_name(name: str) -> str:
    """A name that fits a table, as it is shown."""
    return escape(name if len(name) <= MAX_NAME_CHARACTERS else name[: MAX_NAME_CHARACTERS - 1] + "…")


def with_half_width(interval: Interval, digits: int) -> str:
    """``5.024 ±0.101``: the value and half the width of its interval."""
    return f"{interval.value:.{digits}f} ±{(interval.high - interval.low) / 2:.{digits}f}"


def with_range(interval: Interval, sign: str = "+") -> str:
    """``+0.2479 (+0.2375 … +0.2595)``"""
    return "{:{f}} ({:{f}} … {:{f}})".format(*interval, f=f"{sign}.4f")
