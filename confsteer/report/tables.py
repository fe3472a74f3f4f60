"""Tables that the command line prints: of profiles, scans, evaluations and studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import markup
from rich.console import Console

from confsteer.errors import ProfileError
from confsteer.report.columns import WIDTH, Column, Measured, Table, TableConsole, nothing, plus_minus
from confsteer.report.printable import one_safe_line
from confsteer.steering import DIALS, MADE_BY_HAND, Dial, Steering

if TYPE_CHECKING:
    from torch import Tensor

    from confsteer.calibration.published import PublishedModel
    from confsteer.discovery.select import NearMiss
    from confsteer.discovery.streaming import WithError
    from confsteer.evaluation.comparison import ComparedRow, RowKind, TextComparison
    from confsteer.evaluation.evaluate import Evaluation
    from confsteer.profile.dials import DialEffect
    from confsteer.profile.profile import Profile
    from confsteer.profile.schema import Measurement, ModelIdentity, Neuron
    from confsteer.results.bootstrap import Change, Interval
    from confsteer.studies.cumulative import CumulativeStudy
    from confsteer.studies.induction import ClipEffect, ClippedNeuron, InductionStudy
    from confsteer.tuning.tune import Tuning


def console(*, wide: bool = False, markdown: bool = False) -> TableConsole:
    """Open the terminal, or whatever output goes to: a pipe or a file, which has no width of its own, gets `WIDTH`.

    Args:
        wide: see `TableConsole`.
        markdown: see `TableConsole`.
    """
    console = TableConsole(wide=wide, markdown=markdown)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def escape(text: str) -> str:
    """A string that is shown as it is, whatever rich or the terminal would take it for."""
    return markup.escape(one_safe_line(text))


def print_profile(console: TableConsole, profile: Profile) -> None:
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
                console.table(_neuron_table(f"{kind} neurons (found, but not on the {dial} dial)", neurons, dial))
                continue
        if not neurons:
            by_hand = " An entropy dial is then made by hand: confsteer calibrate --null-direction."
            made = dial == "unigram" or profile.turns_direction(dial)
            console.print(f"[bold]{kind} neurons: none found.[/bold]{'' if made else by_hand}")
            continue
        if dial not in profile.response:
            console.table(_neuron_table(f"{kind} neurons (none has a clear sign: no {dial} dial)", neurons, dial))
            continue
        console.table(_neuron_table(f"{kind} neurons ({dial} dial: {_reach(profile, dial)})", neurons, dial))
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


def _reach(profile: Profile, dial: Dial) -> str:
    """Write how far a dial reaches; with as many digits as a dial that hardly moves needs."""
    low, high = profile.reach(dial)
    form = "+.2f" if max(-low, high) >= 0.05 else "+.1g"
    return f"{low:{form}} to {high:{form}} nats"


def _count(model: ModelIdentity) -> str:
    experts = "" if model.experts is None else f" ({model.experts})"
    return f"{model.n_neurons:,} neurons{experts}"


def _print_null_direction(console: Console, profile: Profile) -> None:
    """Say of the entropy dial that no neurons are on it, and what it does."""
    from confsteer.profile.dials import example_effects

    console.print(
        f"[bold]{MADE_BY_HAND.capitalize()}[/bold] (entropy dial: {_reach(profile, 'entropy')}). {profile.null_direction}"
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
        cliff = f"The null space ends at a cliff: the next singular value is {_ratio(layer.cliff)} times as large"
    else:
        cliff = f"The null space has no clear end: the next singular value is {_ratio(layer.cliff)} times as large"
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


def _ratio(value: float) -> str:
    """Format a ratio in three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".removesuffix(".")


def print_near_misses(console: TableConsole, profile: Profile) -> None:
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
    variance, tokens = percentile(weights.logit_variance), profile.columns["effect_tokens"]

    def at(values: Tensor) -> Callable[[NearMiss], float]:
        return lambda miss: float(values[miss.neuron])

    for kind, effect, share, misses in zip(
        ("an entropy", "a token-frequency"),
        (effects.entropy_abs, effects.frequency),
        (effects.norm_share, effects.frequency_mediation),
        near_misses(weights, effects, cosine, chance),
        strict=True,
    ):
        if not misses:
            console.print(f"No neuron lacks one thing only to be {kind} neuron.")
            continue
        by_write = kind == "an entropy"

        def measured(miss: NearMiss, of: WithError) -> Measured:
            return Measured(float(of.value[miss.neuron]), float(of.standard_error[miss.neuron]))

        columns: tuple[Column[NearMiss], ...] = (
            Column("neuron", "neuron", lambda miss: f"{profile.model.layer}.{profile.model.key(miss.neuron)}"),
            Column("null_fraction", "null fraction", at(weights.null_fraction), ".3f", wide=not by_write),
            Column("logit_variance_percentile", "logit var %ile", at(variance), ".1f", wide=not by_write),
            Column("frequency_cosine", "cosine", at(cosine), "+.3f", wide=by_write),
            Column("effect", "effect", partial(measured, of=effect), ".4f"),
            Column("share", "share", partial(measured, of=share), ".3f"),
            Column("tokens", "tokens", at(tokens), ",.0f", wide=True),
            Column("lacks", "lacks", lambda miss: miss.lacks),
        )
        console.table(Table(f"Not {kind} neuron for one thing only, the largest effects first", columns, [misses]))
    console.print(
        "Share: of the effect, through the final norm or along the unigram direction, beyond its bound by two standard errors; "
        "cosine: with that direction; ± standard error over windows."
    )


def _print_scan(console: TableConsole, profile: Profile) -> None:
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
        norm_percentile, variance_percentile = percentile(weights.norm), percentile(weights.logit_variance)
        columns: tuple[Column[int], ...] = (
            Column("neuron", "neuron", lambda i: f"{model.layer}.{model.key(i)}"),
            Column("norm", "norm", lambda i: float(weights.norm[i]), ".3f"),
            Column("norm_percentile", "norm %ile", lambda i: float(norm_percentile[i]), ".1f"),
            Column("logit_variance", "logit variance", lambda i: float(weights.logit_variance[i]), ".2e"),
            Column("logit_variance_percentile", "logit var %ile", lambda i: float(variance_percentile[i]), ".1f"),
            Column("null_fraction", "null fraction", lambda i: float(weights.null_fraction[i]), ".3f"),
            Column("times_chance", "× chance", lambda i: float(weights.null_fraction[i]) / weights.chance_null_fraction, ".2f"),
        )
        console.table(Table("Candidates for entropy neurons, the longest write into the null space first", columns, [found]))
    else:
        console.print("[bold]Candidates for entropy neurons: none found.[/bold]")
    console.print(
        f"Null fraction: the luckiest of {model.n_neurons:,} random writes exceeds {weights.chance_null_fraction:.3f} 1 time in "
        "20. Where the last layer is was read off the model's structure; calibrate checks that numerically, measures what the "
        "neurons do, and finds token-frequency neurons too."
    )


def print_agreement(console: TableConsole, profile: Profile, known: PublishedModel) -> None:
    """Published neurons with what the scan says of each, then how many of each list are candidates."""
    from confsteer.calibration.published import agreement
    from confsteer.discovery.select import candidates, percentile

    lists, weights = agreement(profile, known), profile.weights
    ranks = {neuron: rank for rank, neuron in enumerate(candidates(weights), start=1)}
    theirs = {i: value for one in lists for i, value in one.published.null_fraction.items()}
    norm, variance = percentile(weights.norm), percentile(weights.logit_variance)

    def listed(neuron: int) -> str:
        return ", ".join(str(number) for number, one in enumerate(lists, start=1) if neuron in one.published.neurons)

    columns: tuple[Column[int], ...] = (
        Column("neuron", "neuron", lambda i: f"{known.layer}.{i}"),
        Column("lists", "lists", listed),
        Column("candidate", "candidate", lambda i: f"{ranks[i]} of {len(ranks)}" if i in ranks else "no"),
        Column("null_fraction", "null fraction", lambda i: float(weights.null_fraction[i]), ".3f"),
        Column("published", "published", theirs.get, ".3f"),
        Column("norm_percentile", "norm %ile", lambda i: float(norm[i]), ".1f"),
        Column("logit_variance_percentile", "logit var %ile", lambda i: float(variance[i]), ".1f"),
    )
    if neurons := list(dict.fromkeys(i for one in lists for i in one.published.neurons)):
        console.table(Table(f"Published neurons of {known.id}", columns, [neurons]))
    kinds = {"entropy": "Entropy neurons", "null fraction": "Largest null fractions", "logit variance": "Least logit variances"}
    for number, (one, found, by_chance) in enumerate(lists, start=1):
        note = f" ({one.note})" if one.note else ""
        among = f"{len(found)} of {len(one.neurons)} are among the {len(ranks)} candidates, by chance {by_chance:.2f} would be"
        console.print(f"{number}. {kinds[one.kind]}, {escape(one.source)}{note}: {among if one.neurons else 'none'}.")


def _neuron_table(title: str, neurons: tuple[Neuron, ...], dial: str) -> Table[Neuron]:
    def measured(name: str, heading: str, digits: int, *, wide: bool = False) -> Column[Neuron]:
        return Column(name, heading, lambda neuron: _measured(getattr(neuron, name)), f".{digits}f", wide=wide)

    own: tuple[Column[Neuron], ...]
    frequency = dial == "unigram"
    loss = measured("total_effect", "|Δloss|", 4, wide=not frequency)
    if frequency:
        effect = measured("frequency_effect", "|ΔKL|", 4)
        cosine: Column[Neuron] = Column("frequency_cosine", "cosine", lambda neuron: neuron.frequency_cosine, "+.3f")
        own = (measured("frequency_mediation", "via unigram", 3), effect, loss, cosine)
    else:
        effect = measured("entropy_effect_abs", "|Δentropy|", 4)
        shares = (measured("norm_share", "through norm", 3), measured("mediation", "mediation", 3, wide=True))
        changed: Column[Neuron] = Column(
            "argmax_changed", "argmax changed", lambda neuron: neuron.argmax_changed, ".2%", wide=True
        )
        own = (*shares, effect, loss, changed)
    columns: tuple[Column[Neuron], ...] = (
        Column("neuron", "neuron", lambda neuron: f"{neuron.layer}.{neuron.key}"),
        Column("sign", "sign", lambda neuron: f"{neuron.sign:+d}" if neuron.sign else "none"),
        Column("norm_percentile", "norm %ile", lambda neuron: neuron.norm_percentile, ".1f", wide=frequency),
        Column(
            "logit_variance_percentile", "logit var %ile", lambda neuron: neuron.logit_variance_percentile, ".1f", wide=frequency
        ),
        Column("null_fraction", "null fraction", lambda neuron: neuron.null_fraction, ".3f", wide=frequency),
        *own,
        Column("active", "tokens", lambda neuron: neuron.active, ".1%"),
        Column("where_active", f"{effect.heading} on these", lambda neuron: _where_active(neuron, dial), ".4f", wide=True),
        measured("total_effect_uncapped", "|Δloss| before softcap", 4, wide=True),
    )
    return Table(title, columns, [neurons])


def _measured(value: Measurement | None) -> Measured | None:
    return None if value is None else Measured(value.value, value.standard_error)


def _where_active(neuron: Neuron, dial: str) -> float | None:
    """Find its effect on the tokens that are routed to it."""
    effect = neuron.entropy_effect_abs if dial == "entropy" else neuron.frequency_effect
    return effect.value / neuron.active if neuron.active else None


def print_evaluation(console: TableConsole, result: Evaluation) -> None:
    """Steerings compared on each text."""
    for text in result.texts:
        _print_comparison(console, text)
    console.print(
        f"{escape(result.name)}. {HOW_TO_READ} {MATCHED} Baselines are fitted on one half of a text and used on the other. Min-p "
        "and top-p are no baselines: they cut the distribution they sample from, and give what they cut no probability at all."
    )


def print_tuning(console: TableConsole, result: Tuning) -> None:
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
        f"changes {result.objective} by {result.validation.value:+.4f} (95 % interval {low:+.4f} … {high:+.4f}). {HOW_TO_READ} "
        f"{MATCHED}",
        sep="\n",
    )


BASELINES = ("temperature", "null write")
"""Kinds of rows of a text with a number that was fitted."""
MATCHED = "T: the temperature that gives the unsteered model the same mean entropy."
HOW_TO_READ = (
    "Nats; ECE of the top prediction, 15 bins; ± half of the 95 % bootstrap interval; * differs from neutral, or a Δ from zero, "
    "by the interval of the paired difference (green: better, red: worse)."
)


def compared_columns(shown: Sequence[str], digits: int = 4) -> tuple[Column[ComparedRow], ...]:
    """Describe the columns of rows that are held against each other, on texts or on questions.

    Args:
        shown: metrics that are not only for wide tables.
        digits: of metrics at most. Means of nats have three: their intervals are wide.
    """
    from confsteer.evaluation.metrics import METRICS

    def less(row: ComparedRow, kind: RowKind, name: str) -> Interval | None:
        return row.minus.get(kind, {}).get(name)

    def form(name: str) -> str:
        most = 3 if name in ("loss", "entropy") else digits
        return f".{METRICS[name].digits}%" if METRICS[name].percent else f".{min(most, METRICS[name].digits)}f"

    def metric(name: str) -> Column[ComparedRow]:
        return Column(
            name,
            METRICS[name].heading,
            lambda row: row.metrics.get(name),
            form(name),
            wide=name not in shown,
            bare=name in ("entropy", "argmax_changed"),
            difference=partial(less, kind="neutral", name=name) if METRICS[name].better else nothing,
            better=METRICS[name].better,
        )

    def change(name: str, kind: RowKind, to: str, *, wide: bool) -> Column[ComparedRow]:
        read = partial(less, kind=kind, name=name)
        field, heading = f"{name}_minus_{kind.replace(' ', '_')}", f"Δ{METRICS[name].heading}{to}"
        return Column(field, heading, read, f"+.{digits}f", wide=wide, difference=read, better=METRICS[name].better)

    return (
        Column("name", "way", lambda row: row.name),
        Column("kind", "kind", lambda row: row.kind, wide=True),
        Column("fitted", "fitted", lambda row: row.values or None, ".3f", wide=True),
        *map(metric, METRICS),
        *(change(name, "neutral", "", wide=True) for name in ("loss", "entropy", "ece")),
        *(change(name, "matched temperature", " to T", wide=False) for name in ("loss", "ece")),
    )


def compared_sections(rows: Iterable[ComparedRow]) -> tuple[list[ComparedRow], list[ComparedRow]]:
    """Part what a steering has to beat from the steerings. Matched temperatures are columns beside their steering."""
    rows = [row for row in rows if row.kind != "matched temperature"]
    return [row for row in rows if row.kind != "steering"], [row for row in rows if row.kind == "steering"]


def text_columns() -> tuple[Column[ComparedRow], ...]:
    """Describe the columns of ways to predict a text."""
    return compared_columns(("loss", "entropy", "ece"))


def _print_comparison(console: TableConsole, text: TextComparison, part: str = "") -> None:
    """Print ways to predict one text."""
    title = f"{text.source}{f' ({part})' if part else ''}: {text.tokens:,} tokens in {text.windows} windows"
    console.table(Table(title, text_columns(), compared_sections(text.rows)))
    fitted = [
        f"{escape(row.name)} {', '.join(f'{value:.3f}' for value in row.values)}" for row in text.rows if row.kind in BASELINES
    ]
    numbers = f" Fitted: {'; '.join(fitted)}." if fitted else ""
    console.print(f"Intervals over {text.blocks} {text.unit}.{numbers}")


def print_induction(console: TableConsole, result: InductionStudy) -> None:
    """Repeated sequences, and what clipping does to them."""
    for kind in result.kinds:
        bounds: Mapping[tuple[int, ...], ClippedNeuron] = {(neuron.index,): neuron for neuron in kind.neurons}

        def bound(clip: ClipEffect, name: str, bounds: Mapping[tuple[int, ...], ClippedNeuron] = bounds) -> Any:
            return getattr(bounds.get(clip.neurons), name, None)

        def nats(name: str, heading: str) -> Column[ClipEffect]:
            def read(clip: ClipEffect) -> Interval:
                change: Change = getattr(clip, name)
                return change.nats

            return Column(name, heading, read, "+.4f", difference=read)

        columns: tuple[Column[ClipEffect], ...] = (
            Column("clipped", "clipped", lambda clip: str(clip.neurons[0]) if len(clip.neurons) == 1 else "all"),
            Column("first_mean", "1st mean", partial(bound, name="first_mean"), ".3f"),
            Column("second_mean", "2nd mean", partial(bound, name="second_mean"), ".3f"),
            Column("clipped_from", "from", partial(bound, name="clipped_from")),
            nats("second_entropy", "Δentropy"),
            Column("relative", "in %", lambda clip: clip.second_entropy.relative.value, "+.1%"),
            nats("second_loss", "Δloss"),
            nats("first_entropy", "Δentropy at 1st"),
        )
        title = f"{kind.kind.capitalize()} ({kind.source}), {kind.sequences} stretches of {result.half} tokens."
        console.table(Table(title, columns, [kind.clips]))
        first, second = ((plus_minus(of.entropy, ".3f"), plus_minus(of.loss, ".3f")) for of in (kind.first, kind.second))
        console.print(
            f"First reading: entropy {first[0]}, loss {first[1]}; second: {second[0]}, {second[1]}.",
        )
    console.print(
        f"{escape(result.model)}. Nats; ± half of the 95 % bootstrap interval over sequences, of changes that of the paired "
        "difference, which does not contain zero where * stands. Changes are of the second reading unless said otherwise."
    )


class _Ablated(NamedTuple):
    """A row of the table of cumulative ablation."""

    name: str
    norm: float
    entropy: Interval
    relative: float | None
    entropy_abs: Interval
    loss: Interval
    loss_abs: Interval


def print_cumulative(console: TableConsole, result: CumulativeStudy) -> None:
    """Entropy neurons ablated together, beside random ones."""
    sections = []
    for step in result.steps:
        number, controls = len(step.neurons), step.controls
        name = f"{'' if number == 1 else '+ '}{step.neurons[-1]}"
        changes = (step.entropy.nats, step.entropy.relative.value, step.entropy_abs, step.loss.nats, step.loss_abs)
        random = (controls.entropy, None, controls.entropy_abs, controls.loss, controls.loss_abs)
        sections.append([_Ablated(name, step.mean_norm, *changes), _Ablated(f"{number} random", controls.mean_norm, *random)])
    columns: tuple[Column[_Ablated], ...] = (
        Column("ablated", "ablated", lambda row: row.name),
        Column("norm", "norm", lambda row: row.norm, ".2f"),
        Column("entropy", "Δentropy", lambda row: row.entropy, "+.4f", difference=lambda row: row.entropy),
        Column("relative", "in %", lambda row: row.relative, "+.2%"),
        Column("entropy_abs", "|Δentropy|", lambda row: row.entropy_abs, ".4f"),
        Column("loss", "Δloss", lambda row: row.loss, "+.4f", difference=lambda row: row.loss),
        Column("loss_abs", "|Δloss|", lambda row: row.loss_abs, ".4f"),
    )
    title = f"{result.model} on {result.source}: {result.tokens:,} tokens in {result.windows} windows"
    console.table(Table(title, columns, sections))
    console.print(
        f"Unsteered entropy {plus_minus(result.entropy, '.3f')}, loss {plus_minus(result.loss, '.3f')}. Nats; ± half of the 95 % "
        f"bootstrap interval over windows; random: the mean of {len(result.draws)} draws, ± half of the way from the lowest to "
        "the highest; * no zero between the ends. Norm: mean of the writes."
    )
