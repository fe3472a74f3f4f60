"""Every measurement of the paper (Stolfo et al. 2024, arXiv 2406.16254) on a given model, in one report.

Writes ``report.json`` with the numbers, then ``report.md`` with its pictures, the paper's figures beside ours. Without MODEL it
is about the bundled model. Its results lie beside this script, with those of real models. For GPT-2 small the published numbers
of its neurons are printed next to the measured ones.

    python eval/reproduce_paper.py
    python eval/reproduce_paper.py openai-community/gpt2 --text a.txt --text b.txt --sequences 1000
    python eval/reproduce_paper.py MODEL.gguf --profile qwen2.5-coder-0.5b-instruct --text a.txt --measure-only    # no matplotlib
    python eval/reproduce_paper.py --profile qwen2.5-coder-0.5b-instruct --draw OUT/report.json
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

import confsteer
from confsteer import ConfsteerError, Profile
from confsteer.discovery.weights import weight_statistics
from confsteer.model.dissect import dissect
from confsteer.model.loading import DEMO_NAME, LoadedModel, load_model
from confsteer.profile.schema import CorpusIdentity, Measurement
from confsteer.results.bootstrap import Interval
from confsteer.results.result import Result
from confsteer.steering import DIALS
from confsteer.studies.cumulative import CumulativeStudy, cumulative
from confsteer.studies.heads import INDUCTION_SCORE, HeadStudy, bos_ablation
from confsteer.studies.induction import ClipEffect, InductionStudy, RepeatedSequences, induction
from confsteer.studies.repetition import Repetition, natural_cut
from confsteer.text.sources import python_docs, read_texts
from confsteer.text.windows import Document, Windows, make_windows

PUBLISHED = Path(__file__).with_name("gpt2_small_published.json")
GPT2_SMALL = ("gpt2", "openai-community/gpt2")
MOST_ABLATED = 10
"""Entropy neurons ablated together: each costs a readout of the text, and one more for each draw of random neurons."""


class Findings(NamedTuple):
    """Measurements of a model besides its profile; None where it has no entropy neurons."""

    cumulative: CumulativeStudy | None
    induction: InductionStudy | None
    heads: HeadStudy | None
    published: str
    """GPT-2 small's published numbers beside those measured, or why there are none."""
    seconds: dict[str, float]
    device: str

    def json(self, profile: Profile) -> str:
        """Everything, with five digits: more than the intervals allow, and half the file."""
        document: dict[str, Any] = {"profile": json.loads(profile.model_dump_json())}
        for name, value in self._asdict().items():
            document[name] = json.loads(value.model_dump_json()) if isinstance(value, Result) else value
        short = json.loads(json.dumps(document), parse_float=lambda x: float(f"{float(x):.5g}"))
        return json.dumps(short, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, file: Path) -> Findings:
        """From what `json` wrote."""
        document = json.loads(file.read_text(encoding="utf-8"))
        studies: dict[str, type[Result]] = {"cumulative": CumulativeStudy, "induction": InductionStudy, "heads": HeadStudy}
        found = {name: document[name] and kind.model_validate(document[name]) for name, kind in studies.items()}
        return cls(**{name: document[name] for name in cls._fields} | found)


class Sizes(NamedTuple):
    """How much text is read."""

    window: int
    tokens: int
    repeat: Repetition


@click.command()
@click.argument("model", required=False)
@click.option("--profile", metavar="PROFILE", help="Of MODEL.  [default: calibrate on the text]")
@click.option("--text", "files", type=click.Path(path_type=Path), multiple=True, help="As of confsteer calibrate; repeatable.")
@click.option("--window", default=256, show_default=True, help="Tokens per window.")
@click.option("--tokens", default=5_120, show_default=True, help="Read at most this many for cumulative ablation.")
@click.option("--sequences", default=100, show_default=True, help="Of each kind, for induction; the paper has 1,000.")
@click.option("--half", default=100, show_default=True, help="Tokens of a stretch that is read twice.")
@click.option("--device", help="cpu or cuda.  [default: CUDA if there is one]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder.  [default: eval/reproduce_paper/NAME]")
@click.option("--measure-only", is_flag=True, help="Write report.json alone, without the pictures that need matplotlib.")
@click.option("--draw", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Write the report of a report.json.")
def main(
    model: str | None,
    profile: str | None,
    files: tuple[Path, ...],
    window: int,
    tokens: int,
    sequences: int,
    half: int,
    device: str | None,
    out: Path | None,
    measure_only: bool,
    draw: Path | None,
) -> None:
    """Measure MODEL and write the report."""
    if draw is not None:
        write_report(Profile.load(profile or DEMO_NAME), Findings.read(draw), draw.parent)
        return
    if model is not None and not files:
        raise click.UsageError("give some text: --text FILE")
    try:
        texts = list(read_texts(files)) if files else python_docs("held-out")
        source = ", ".join(file.name for file in files) or "Python documentation (held-out half)"
        loaded = load_model(model, device=device)
        if profile is None and model is not None:
            found = confsteer.calibrate(*loaded, texts, window=window, source=source, progress=True)
        else:
            found = Profile.load(profile or DEMO_NAME)
        findings = measure(loaded, found, texts, source, Sizes(window, tokens, Repetition(sequences, half)))
    except ConfsteerError as error:
        raise click.ClickException(str(error)) from error
    out = out or Path(__file__).with_suffix("") / Path(profile or found.model.id).name
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(findings.json(found), encoding="utf-8")
    click.echo(f"Written: {out / 'report.json'}")
    if not measure_only:
        write_report(found, findings, out)


def measure(loaded: LoadedModel, profile: Profile, texts: Sequence[Document], source: str, sizes: Sizes) -> Findings:
    """Run every study of the paper that the model has neurons for."""
    tokenizer, seconds = loaded.tokenizer, {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = run()
        seconds[name] = round(time.monotonic() - began, 1)
        return result

    stretch, most = natural_cut(tokenizer, sizes.repeat)
    natural = make_windows(texts, tokenizer, window=stretch, max_tokens=most, source=source)
    ablated = repeated = heads = None
    if profile.entropy_neurons:
        k = min(MOST_ABLATED, len(profile.entropy_neurons))
        windows = make_windows(texts, tokenizer, window=sizes.window, max_tokens=sizes.tokens, source=source)
        ablated = timed("cumulative", lambda: cumulative(loaded.model, windows, profile, k=k, progress=True))
        repeated = timed("induction", lambda: induction(*loaded, profile, text=natural, repeat=sizes.repeat, progress=True))
        heads = timed("heads", lambda: bos_ablation(*loaded, profile, repeat=sizes.repeat, progress=True))
    published = "Skipped: the published numbers are of GPT-2 small, which this model is not."
    if profile.model.id in GPT2_SMALL:
        published = against_published(*loaded, profile, natural, sizes.repeat)
    device = loaded.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Findings(ablated, repeated, heads, published, seconds, name)


def write_report(profile: Profile, findings: Findings, out: Path) -> None:
    """Draw the pictures, and write ``report.md`` beside them."""
    # Where numbers alone are wanted matplotlib need not be there.
    from confsteer.report import plots

    plots.plot_neurons(profile).savefig(out / "neurons.png")
    plots.plot_frequency_neurons(profile).savefig(out / "frequency_neurons.png")
    if profile.response:
        plots.plot_response(profile).savefig(out / "response.png")
    if findings.cumulative:
        plots.plot_cumulative(findings.cumulative).savefig(out / "cumulative.png")
    if findings.induction:
        plots.plot_induction(findings.induction).savefig(out / "induction.png")
    sections = {
        f"The paper's measurements on {profile.model.id}": head(profile, findings),
        "The paper's figures beside these": beside_the_paper(profile, findings),
        "Null space": null_space(profile),
        "Neurons: weights": neuron_table(profile),
        "Total and direct effects": effects(profile),
        "Token-frequency neurons": frequency(profile),
        "Cumulative ablation": cumulative_section(findings.cumulative),
        "Induction": induction_section(findings.induction),
        "Induction heads: BOS ablation": heads_section(findings.heads),
        "Clamping: response of the dials": response(profile),
        "GPT-2 small: against published numbers": findings.published,
    }
    first, *rest = sections.items()
    text = "\n\n".join([f"# {first[0]}\n\n{first[1]}", *(f"## {title}\n\n{body}" for title, body in rest)])
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    click.echo(f"Written: {out / 'report.md'}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is aligned left, numbers right."""
    rule = "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def measured(value: Measurement) -> str:
    return f"{value.value:.4f}" + ("" if value.standard_error is None else f" ± {value.standard_error:.4f}")


def interval(value: Interval, sign: str = "+") -> str:
    return "{:{f}} ({:{f}} to {:{f}})".format(*value, f=f"{sign}.4f")


def corpus_of(profile: Profile) -> CorpusIdentity:
    assert profile.corpus is not None  # a scan has none, and this script calibrates
    return profile.corpus


def head(profile: Profile, findings: Findings) -> str:
    model, corpus = profile.model, corpus_of(profile)
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    return (
        "Made by `eval/reproduce_paper.py`; the paper is Stolfo et al. 2024, arXiv 2406.16254. Everything is in nats. The "
        "numbers, with more digits, are in `report.json`.\n\n"
        f"- Model: {model.id} ({model.model_type}), layer {model.layer} (the last), {model.n_neurons:,} neurons, d_model "
        f"{model.d_model}, {model.tokenizer_size:,} tokens in the vocabulary.\n"
        f"- Profile: {corpus.kept_tokens:,} tokens in {corpus.windows} windows of {corpus.source}; {versions}.\n"
        f"- Unsteered on that text: entropy {profile.layer.entropy:.3f}, loss {profile.layer.loss:.3f}.\n"
        f"- Found: {len(profile.entropy_neurons)} entropy neurons, {len(profile.frequency_neurons)} token-frequency neurons.\n"
        f"- Measured in {sum(findings.seconds.values()):.0f} s on {findings.device}."
        + ("\n\n" + DEMO_CAVEAT if model.id == DEMO_NAME else "")
    )


DEMO_CAVEAT = (
    "**This model is no evidence for the paper.** The null space of its unembedding and the eight neurons that write into it "
    "were given to it (see its model card), so null fractions and mediation of 1 are true by construction. What those neurons "
    "react to, with what sign, and all else below was learned."
)


def beside_the_paper(profile: Profile, findings: Findings) -> str:
    """Figures that the paper reports of other models, and the same of this one."""
    layer, neurons = profile.layer, profile.entropy_neurons
    cliff = "an exact null space" if layer.cliff is None else f"the next singular value is {layer.cliff:.4g} times as large"
    rows = [
        (
            "directions of the null space",
            "GPT-2 small 12 of 768, LLaMA-2 7B 40 of 4,096",
            f"{layer.null_dims} of {profile.model.d_model}; {cliff}",
        )
    ]
    if neurons:
        most = max(neurons, key=lambda n: n.mediation.value)
        strongest = max(neurons, key=lambda n: n.entropy_effect_abs.value)
        rows += [
            (
                "highest mediation, 1 − direct/total",
                "GPT-2, LLaMA-2 7B, Phi-2 up to about 0.8; Pythia, Gemma about 0.4",
                f"{most.mediation.value:.2f} ({most.layer}.{most.index}, null fraction {most.null_fraction:.3f})",
            ),
            (
                "abs. Δentropy of the strongest neuron at its mean; argmax changed",
                "LLaMA-2 7B: 0.037 nats, 0.2 %",
                f"{strongest.entropy_effect_abs.value:.3f} nats ({strongest.layer}.{strongest.index}), "
                f"{strongest.argmax_changed:.1%}",
            ),
        ]
    if findings.cumulative:
        steps = findings.cumulative.steps[:3]
        changes = ", ".join(f"{step.entropy.relative.value:+.2%}" for step in steps)
        rows.append(("Δentropy, 1, 2 and 3 neurons at their means", "GPT-2 small −1.87, −2.42, −2.53 %", changes))
    for kind in findings.induction.kinds if findings.induction else ():
        single = [clip for clip in kind.clips if len(clip.neurons) == 1]
        name, mean, lowest, highest = max((clip_changes(kind, clip) for clip in single), key=lambda change: abs(change[1]))
        rows.append(
            (
                f"{kind.kind} tokens read again: Δentropy, one neuron clipped",
                "GPT-2 small 11.2378: up to −70 % at a position",
                f"{name}: {mean:+.1%}; at single positions {lowest:+.0%} to {highest:+.0%}",
            )
        )
    if findings.heads:
        highest = max(score for scores in findings.heads.scores for score in scores)
        rows.append(
            (
                f"induction heads: score above {INDUCTION_SCORE}",
                "there are; without them the neurons take less part",
                f"{len(findings.heads.heads)}; the highest score is {highest:.2f}",
            )
        )
    if "entropy" in profile.response:
        curve = profile.response["entropy"].entropy
        rows.append(
            (
                "entropy by clamping, nats",
                "GPT-2 medium 23.945 from 0 to 5: 2.61 to 3.44",
                f"all together: {min(curve):.2f} to {max(curve):.2f}",
            )
        )
    return "Other models, other text: orders of magnitude are compared here, not digits.\n\n" + table(["", "paper", "here"], rows)


def clip_changes(kind: RepeatedSequences, clip: ClipEffect) -> tuple[int, float, float, float]:
    """A clipped neuron, and the relative changes of the entropy of what is read again: mean, lowest and highest position."""
    again = slice(kind.positions.index(kind.repeats_from), None)
    changes = [after / before - 1 for after, before in zip(clip.entropy.mean[again], kind.entropy.mean[again], strict=True)]
    return clip.neurons[0], clip.second_entropy.relative.value, min(changes), max(changes)


BANDS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of null fractions, in the table of mediation."""


def null_space(profile: Profile) -> str:
    """The unembedding's smallest singular values, and mediation by null fraction."""
    values, null = profile.columns["singular_values"], profile.columns["null_fraction"]
    mediation = 1 - profile.columns["direct"] / profile.columns["total"]
    rows = []
    for low, high in itertools.pairwise(BANDS):
        inside = (null >= low) & ((null < high) | (high == BANDS[-1])) & mediation.isfinite()
        if inside.any():
            lowest, median, highest = (float(mediation[inside].quantile(q)) for q in (0.0, 0.5, 1.0))
            rows.append((f"{low:g} to {high:g}", int(inside.sum()), f"{median:+.3f}", f"{lowest:+.3f}", f"{highest:+.3f}"))
    smallest = ", ".join(f"{float(value):.3g}" for value in values[: max(6, profile.layer.null_dims + 2)])
    return (
        f"Smallest singular values of the folded unembedding: {smallest}; median {float(values.median()):.3g}, largest "
        f"{float(values[-1]):.3g}. The smallest {profile.layer.null_dims} count as its null space. Mediation of all neurons of "
        "the layer by null fraction, the paper's figure 2e:\n\n"
        + table(["null fraction", "neurons", "mediation, median", "lowest", "highest"], rows)
    )


def neuron_table(profile: Profile) -> str:
    """Norm, logit variance and null fraction of the neurons found, within the layer."""
    columns = {name: profile.columns[name] for name in ("norm", "logit_variance", "null_fraction")}
    rows: list[Sequence[object]] = [
        (
            f"{n.layer}.{n.index}",
            kind,
            f"{n.norm:.3f}",
            f"{n.norm_percentile:.0f}",
            f"{n.logit_variance:.3g}",
            f"{n.logit_variance_percentile:.0f}",
            f"{n.null_fraction:.3f}",
        )
        for kind, neurons in (("entropy", profile.entropy_neurons), ("frequency", profile.frequency_neurons))
        for n in neurons
    ]
    norm, variance, null = (f"{float(column.median()):.3g}" for column in columns.values())
    rows.append(("layer, median", "", norm, 50, variance, 50, null))
    layer, below = profile.layer, [n for n in profile.entropy_neurons if n.norm_percentile < 50]
    found = "" if profile.entropy_neurons else "**No entropy neurons were found in this model.** "
    found += "" if profile.frequency_neurons else "**No token-frequency neurons were found in this model.** "
    if below:
        found += (
            f"{len(below)} of the {len(profile.entropy_neurons)} entropy neurons have a norm below the layer's median, unlike "
            "the paper's, which stand out by a high norm. "
        )
    return (
        "![Norm against logit variance; null fraction against mediation](neurons.png)\n\n"
        f"Figures 2a and 2e of the paper. {found}Null fraction: share of the write in the {layer.null_dims} directions that the "
        f"unembedding reads least; the luckiest of as many random writes exceeds {layer.chance_null_fraction:.3f} 1 time in 20."
        "\n\n" + table(["neuron", "kind", "norm", "percentile", "logit variance", "percentile", "null fraction"], rows)
    )


def effects(profile: Profile) -> str:
    """Mean ablation: total and direct effects on the loss and how much goes through the norm."""
    rows = [
        (
            f"{n.layer}.{n.index}",
            measured(n.total_effect),
            measured(n.direct_effect),
            measured(n.mediation),
            measured(n.entropy_effect),
            measured(n.entropy_effect_abs),
            f"{n.argmax_changed:.2%}",
        )
        for n in profile.entropy_neurons
    ]
    quantiles = [
        (f"layer, {name}", *(f"{float(profile.columns[column].quantile(q)):.4f}" for column in MEANS), "")
        for name, q in (("median", 0.5), ("99th percentile", 0.99), ("largest", 1.0))
    ]
    corpus, tokens = corpus_of(profile), profile.columns.get("effect_tokens")
    sampled = "" if tokens is None else f", for most neurons of the layer a sample of {int(tokens.min()):,}"
    return (
        "A neuron is set to its mean. Total effect: mean |Δloss|; direct effect: the same with the final norm frozen; mediation: "
        f"1 − direct/total. {corpus.kept_tokens:,} tokens{sampled}; ± standard error over {corpus.windows} windows.\n\n"
        + table(["neuron", "total", "direct", "mediation", "Δentropy", "abs. Δentropy", "argmax changed"], [*rows, *quantiles])
    )


MEANS = ("total", "direct", "mediation", "entropy", "entropy_abs")
"""Columns of a profile, in the order of the table of effects."""


def frequency(profile: Profile) -> str:
    rows = [
        (
            f"{n.layer}.{n.index}",
            measured(n.frequency_effect),
            measured(n.frequency_mediation),
            measured(n.total_effect),
            f"{n.frequency_cosine:+.3f}",
        )
        for n in profile.frequency_neurons
    ]
    return (
        "![Mean |ΔKL| against frequency mediation](frequency_neurons.png)\n\n"
        "Frequency mediation: the share of a neuron's effect on the loss that is gone when the logits are held at their "
        "projection on the unigram direction. KL is KL(P_freq ‖ P_model), as in the paper's code. The unigram distribution was "
        f"counted on {corpus_of(profile).unigram_tokens:,} tokens. The luckiest of as many random writes has a cosine beyond "
        f"{profile.layer.chance_frequency_cosine:.3f} with the unigram direction 1 time in 20. ± standard error over windows.\n\n"
        + (
            table(["neuron", "mean abs. ΔKL", "frequency mediation", "mean abs. Δloss", "cosine with unigram"], rows)
            if rows
            else "**No token-frequency neurons were found in this model.**"
        )
    )


NOT_MEASURED = "**Not measured: no entropy neurons were found in this model.**"


def cumulative_section(study: CumulativeStudy | None) -> str:
    if study is None:
        return NOT_MEASURED
    columns = ["neurons", "norm", "Δentropy", "in %", "abs. Δentropy", "Δloss", "abs. Δloss"]
    rows: list[Sequence[object]] = []
    for step in study.steps:
        ours = (interval(step.entropy_abs, ""), interval(step.loss.nats), interval(step.loss_abs, ""))
        relative = f"{step.entropy.relative.value:+.2%}"
        rows.append((f"… {step.neurons[-1]}", f"{step.mean_norm:.3f}", interval(step.entropy.nats), relative, *ours))
        c = step.controls
        spread = (interval(c.entropy_abs, ""), interval(c.loss), interval(c.loss_abs, ""))
        rows.append((f"{len(step.neurons)} random", f"{c.mean_norm:.3f}", interval(c.entropy), "", *spread))
    last = study.steps[-1]
    verdicts = [
        f"- {name} of all {len(last.neurons)}: {place(ours, theirs, sign)} the random neurons' {interval(theirs, sign)}."
        for name, ours, theirs, sign in (
            ("mean Δentropy", last.entropy.nats, last.controls.entropy, "+"),
            ("mean |Δentropy|", last.entropy_abs, last.controls.entropy_abs, ""),
            ("mean Δloss", last.loss.nats, last.controls.loss, "+"),
            ("mean |Δloss|", last.loss_abs, last.controls.loss_abs, ""),
        )
    ]
    ratio = last.controls.mean_norm / last.mean_norm
    if abs(ratio - 1) > 0.05:
        verdicts.append(
            f"- The random neurons' norms are {ratio:.2f} times those of the entropy neurons: the ten nearest are no nearer."
        )
    return (
        "![Changes of entropy and loss by number of neurons](cumulative.png)\n\n"
        f"The strongest entropy neurons set to their means, one more in each row, and as many random neurons, each drawn out of "
        f"the ten nearest in norm. {study.tokens:,} tokens in {study.windows} windows of {study.source}; unsteered entropy "
        f"{interval(study.entropy, '')}, loss {interval(study.loss, '')}. Entropy neurons: 95 % bootstrap interval over windows. "
        f"Random: mean, lowest and highest of {len(study.draws)} draws. Norm: mean of the writes.\n\n"
        + table(columns, rows)
        + "\n\n"
        + "\n".join(verdicts)
    )


def place(ours: Interval, theirs: Interval, sign: str = "+") -> str:
    """Where an interval lies relative to another."""
    where = "above" if ours.low > theirs.high else "below" if ours.high < theirs.low else "**not apart from**"
    return f"{interval(ours, sign)} is {where}"


def induction_section(study: InductionStudy | None) -> str:
    if study is None:
        return NOT_MEASURED
    return (
        "![Entropy, loss and activations by position](induction.png)\n\n"
        f"A stretch of {study.half} tokens is read twice. Each neuron is clipped at its mean of the first reading, from above if "
        "its mean rises at the second and from below if it falls, at every position. Both readings are compared at the same "
        "predictions. In brackets: 95 % bootstrap intervals over sequences, of paired differences where they are of changes, for "
        "the clips as they are.\n\n" + "\n\n".join(kind_section(kind) for kind in study.kinds)
    )


def kind_section(kind: RepeatedSequences) -> str:
    bounds: dict[tuple[int, ...], tuple[str, str, str]] = {
        (n.index,): (f"{n.first_mean:.3f}", f"{n.second_mean:.3f}", n.clipped_from) for n in kind.neurons
    }
    rows: list[Sequence[object]] = [
        (
            clip.neurons[0] if len(clip.neurons) == 1 else "all",
            *bounds.get(clip.neurons, ("", "", "")),
            interval(clip.second_entropy.nats),
            f"{clip.second_entropy.relative.value:+.2%}",
            interval(clip.second_loss.nats),
            interval(clip.first_entropy.nats),
        )
        for clip in kind.clips
    ]
    columns = ["clipped", "mean, 1st", "mean, 2nd", "from", "Δentropy, 2nd", "in %", "Δloss, 2nd", "Δentropy, 1st"]
    first, second = kind.clips[-1].first_entropy.nats, kind.clips[-1].second_entropy.nats
    verdict = (
        f"All clipped, the change of entropy at the second reading, {place(second, first)} that at the first, {interval(first)}."
    )
    if second.low > max(0.0, first.high):
        verdict += " Unclipped they lower the entropy of what is read again; the paper's 11.2378 of GPT-2 small raises it."
    if kind.second.entropy.high >= kind.first.entropy.low:
        verdict += " **The entropy does not clearly fall at the second reading.**"
    return (
        f"### {kind.kind.capitalize()} tokens\n\n{kind.sequences} sequences ({kind.source}). Unsteered entropy "
        f"{interval(kind.first.entropy, '')} at the first reading and {interval(kind.second.entropy, '')} at the second, loss "
        f"{interval(kind.first.loss, '')} and {interval(kind.second.loss, '')}.\n\n{table(columns, rows)}\n\n{verdict}"
    )


def heads_section(study: HeadStudy | None) -> str:
    if study is None:
        return NOT_MEASURED
    highest = max(score for layer in study.scores for score in layer)
    found = (
        f"{study.sequences} stretches of {study.half} random tokens, read twice. A head's score is its mean attention from a "
        "token of the second reading to the one after its first occurrence; the highest is "
        f"{highest:.3f}, and above {INDUCTION_SCORE} a head counts as an induction head, as in the paper."
    )
    if not study.heads:
        return f"{found} **This model has none, so nothing was ablated.**"
    rows = [
        (
            n.index,
            f"{n.first_mean:.3f}",
            f"{n.second_mean:.3f}",
            interval(n.change),
            f"{n.change.value / (n.first_mean - n.second_mean):.0%}",
        )
        for n in study.neurons
    ]
    named = ", ".join(f"{layer}.{head} ({study.scores[layer][head]:.2f})" for layer, head in study.heads)
    return (
        f"{found} Those are {named}. With all their attention rows one-hot on position 0, the second reading's mean entropy "
        f"changes by {interval(study.entropy.nats)} and its loss by {interval(study.loss.nats)}. Undone: share of the change "
        "from the first reading to the second that goes back. 95 % bootstrap intervals over sequences, of paired differences. "
        "There is no control with other heads.\n\n"
        + table(["neuron", "mean, 1st", "mean, 2nd", "change of the 2nd by the ablation", "undone"], rows)
    )


def response(profile: Profile) -> str:
    """What setting all neurons of a dial along their signs does."""
    if not profile.response:
        return "**Not measured: the model has no neurons to clamp.**"
    corpus = corpus_of(profile)
    parts = [
        "![Response of the dials](response.png)",
        "All neurons of a kind are moved together, each by the dial's position in units of its own standard deviation. "
        f"Means over {corpus.kept_tokens:,} tokens in {corpus.windows} windows; no intervals are kept of these.",
    ]
    for dial in DIALS:
        if dial in profile.response:
            curve = profile.response[dial]
            columns = zip(curve.position, curve.entropy, curve.loss, curve.kl_model_unigram, curve.argmax_changed, strict=True)
            rows = [(f"{p:+.3g}", f"{h:.3f}", f"{loss:.3f}", f"{kl:.3f}", f"{argmax:.1%}") for p, h, loss, kl, argmax in columns]
            titles = [f"{dial} position", "entropy", "loss", "KL(P_model ‖ P_freq)", "argmax changed"]
            parts.append(table(titles, rows))
    return "\n\n".join(parts)


def against_published(model: Any, tokenizer: Any, profile: Profile, natural: Windows, repeat: Repetition) -> str:
    """GPT-2 small's published neurons and numbers next to those measured here."""
    facts = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lists = []
    for kind, key, neurons in (
        ("entropy", "entropy_neurons", profile.entropy_neurons),
        ("token-frequency", "token_frequency_neurons", profile.frequency_neurons),
    ):
        ours = {neuron.index for neuron in neurons}
        named: list[int] = facts[key]
        lists.append(
            f"- {kind} neurons: {len(ours.intersection(named))} of the {len(named)} named ones are found; "
            f"missed: {', '.join(str(i) for i in named if i not in ours) or 'none'}; "
            f"found besides: {', '.join(str(i) for i in sorted(ours.difference(named))) or 'none'}."
        )
    weights = weight_statistics(dissect(model).readout(profile.model.tokenizer_size), null_dims=facts["null_dims"])
    rows = []
    for name, theirs in facts["neurons"].items():
        measurements = {
            "norm": weights.norm,
            "logit_variance": weights.logit_variance,
            "null_fraction": weights.null_fraction,
            "mean_activation": profile.columns["mean_activation"],
        }
        row = [name]
        for key, column in measurements.items():
            row += [f"{theirs[key]:.4g}", f"{float(column[int(name)]):.4g}"]
        rows.append(row)
    columns = ["neuron", "norm", "here", "logit variance", "here", f"null fraction (k = {facts['null_dims']})", "here"]
    clipped: int = facts["induction"]["neuron"]
    study = induction(model, tokenizer, profile, text=natural, repeat=repeat, neurons=[clipped], progress=True)
    lists += [clip_sentence(kind, facts["induction"]["published"]) for kind in study.kinds]
    ablation = facts["cumulative_ablation"]
    lists.append(
        f"- cumulative ablation of {', '.join(map(str, ablation['neurons']))}; published: {ablation['published']}; measured "
        "above, in the order found here."
    )
    titles = [*columns, "mean activation", "here"]
    return "\n\n".join(
        [
            f"{facts['source']} Conventions differ (positions, folding, null space), so both are printed and nothing is judged.",
            table(titles, rows),
            "\n".join(lists),
        ]
    )


def clip_sentence(kind: RepeatedSequences, published: str) -> str:
    """What clipping one neuron does at the second reading, on average and at the position where it lowers the entropy most."""
    (clip,) = kind.clips
    name, _, lowest, highest = clip_changes(kind, clip)
    relative = clip.second_entropy.relative
    return (
        f"- {name} clipped, {kind.kind} tokens read again: mean entropy {relative.value:+.1%} ({relative.low:+.1%} to "
        f"{relative.high:+.1%}), at single positions {lowest:+.1%} to {highest:+.1%}; published: {published}."
    )


if __name__ == "__main__":
    main()
