"""Is steering more than a temperature? Tuned on each text, on all, and on all but the one it is tested on.

    python eval/study_calibration.py --text books=FOLDER --text wikitext-2=FILE --text tinystories=FILE

The Python documentation (its held-out half: the other half is what the shipped profile was calibrated on) is always among the
texts. Each text is cut in four as `confsteer tune` does it; everything is fitted on first parts, stopped by second parts, and
the tables are of fourth parts. ``control`` tunes as many neurons of the same layer that were drawn at random, in the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from confsteer import Profile
from confsteer.evaluation.comparison import Candidate, compare
from confsteer.evaluation.evaluate import read_sample, unsteered, with_matched_temperatures
from confsteer.evaluation.fit import fit_null_write, fit_temperature
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.model.loading import load_model
from confsteer.profile.schema import library_versions
from confsteer.text.sources import TextSource
from confsteer.tuning.splits import Split, split
from confsteer.tuning.tune import Tuned, search

WINDOW = 256
"""Tokens per window, as calibration and tuning have it."""
WAYS = ("temperature", "null write", "dials", "neurons", "neurons, temperature", "control")


class Text(NamedTuple):
    """A text, and the same with the control's neurons in place of the profile's."""

    split: Split
    control: Split


class Fitted(NamedTuple):
    """What was fitted to one choice of texts."""

    temperature: Intervention
    null_write: Intervention
    tuned: dict[str, Tuned]


def control_profile(profile: Profile, seed: int) -> Profile:
    """The profile with as many other neurons of the layer, drawn at random, in place of its own."""
    own = [neuron.index for neuron in profile.steerable]
    active = [i for i in range(profile.model.n_neurons) if i not in own and profile.columns["std_activation"][i] > 0]
    drawn = torch.tensor(active)[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))[: len(own)]].tolist()
    neurons = [
        neuron.model_copy(
            update={
                "index": i,
                "mean_activation": float(profile.columns["mean_activation"][i]),
                "std_activation": float(profile.columns["std_activation"][i]),
            }
        )
        for neuron, i in zip(profile.steerable, drawn, strict=True)
    ]
    k = len(profile.entropy_neurons)
    return profile.model_copy(update={"entropy_neurons": tuple(neurons[:k]), "frequency_neurons": tuple(neurons[k:])})


def fit_all(profile: Profile, control: Profile, texts: Sequence[Text]) -> Fitted:
    splits = [text.split for text in texts]
    train = [one.train.reading for one in splits]
    return Fitted(
        fit_temperature(train),
        fit_null_write(train),
        {
            "dials": search(profile, splits, "dials"),
            "neurons": search(profile, splits),
            "neurons, temperature": search(profile, splits, with_temperature=True),
            "control": search(control, [text.control for text in texts]),
        },
    )


def test(fitted: Fitted, text: Text) -> dict[str, Any]:
    """Loss and calibration on the test part of a text, and what is left of them against temperatures."""
    control = {"control": fitted.tuned["control"]}
    own = {name: tuned for name, tuned in fitted.tuned.items() if name not in control}
    results: dict[str, Any] = {}
    # The control's neurons need a reading of their own; what does not touch neurons comes out the same.
    for sample, ways in ((text.control.test, control), (text.split.test, own)):
        candidates = [
            unsteered(sample),
            Candidate("temperature", "temperature", sample.everywhere(fitted.temperature)),
            Candidate("null write", "null write", sample.everywhere(fitted.null_write)),
            *with_matched_temperatures(
                sample,
                [one.steering for one in ways.values()],
                [one.intervention for one in ways.values()],
                list(ways),
                text.split.unigram,
            ),
        ]
        rows = compare(sample, candidates, text.split.unigram).rows
        results |= {row.name: {"metrics": row.metrics, "minus": row.minus, "values": row.values} for row in rows}
    return results


def table(results: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """A row per choice of texts and way, a column per text tested on: loss and ECE, and the loss less the temperature's."""
    lines = ["| tuned on | way | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]

    def cell(way: dict[str, Any]) -> str:
        loss, ece = way["metrics"]["loss"].value, way["metrics"]["ece"].value
        against = way["minus"].get("temperature")
        beats = ""
        if against:
            difference = against["loss"]
            sure = difference.high < 0 or difference.low > 0
            beats = f" ({difference.value:+.3f}{'*' if sure else ''})"
        return f"{loss:.3f} / {ece:.3f}{beats}"

    neutral = {name: results[f"{name}"][name]["neutral"] for name in names}
    lines.append("| – | neutral | " + " | ".join(cell({**neutral[name], "minus": {}}) for name in names) + " |")
    for chosen, tested in results.items():
        for way in WAYS:
            cells = [cell(tested[name][way]) if name in tested else "" for name in names]
            lines.append(f"| {chosen if way == WAYS[0] else ''} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--text", "texts", multiple=True, metavar="NAME=PATH", help="A text besides the Python documentation.")
@click.option("--model", help="Hub id or folder.  [default: the bundled model]")
@click.option("--profile", "profile_name", default="confsteer-demo", show_default=True)
@click.option("--tokens", default=30_000, show_default=True, help="Read at most this many of each text.")
@click.option("--seed", default=0, show_default=True, help="Of the control's neurons and of how documents are shared out.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("eval/study_calibration"), show_default=True)
def main(texts: tuple[str, ...], model: str | None, profile_name: str, tokens: int, seed: int, out: Path) -> None:
    """Compare neutral, temperatures and tuned steerings on several texts."""
    began = time.monotonic()
    loaded, profile = load_model(model), Profile.load(profile_name)
    control = control_profile(profile, seed)
    readers = [Reader(loaded.model, one) for one in (profile, control)]
    sources = {"Python documentation": TextSource(name="Python documentation", bundled="held-out")}
    for text in texts:
        name, _, path = text.partition("=")
        sources[name] = TextSource(name=name, text=(Path(path),))
    read: dict[str, Text] = {}
    for name, source in sources.items():
        windows = source.windows(loaded.tokenizer, WINDOW, tokens)
        samples = [read_sample(reader, windows) for reader in readers]
        read[name] = Text(*(split(sample, windows, profile, seed) for sample in samples))
        click.echo(f"read {name}: {samples[0].reading.tokens:,} tokens, {len(samples[0].block.unique())} {samples[0].unit}")
    choices: dict[str, list[str]] = {name: [name] for name in sources}
    choices["all"] = list(sources)
    results: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}

    def run(label: str, chosen: Sequence[str], tested: Sequence[str]) -> None:
        fitted = fit_all(profile, control, [read[name] for name in chosen])
        results[label] = {name: test(fitted, read[name]) for name in tested}
        found[label] = {
            way: {"steering": str(tuned.steering), "temperature": tuned.temperature, "steps": tuned.steps}
            for way, tuned in fitted.tuned.items()
        }
        click.echo(f"{time.monotonic() - began:6.0f} s  tuned on {label}")

    for label, chosen in choices.items():
        run(label, chosen, list(sources))
    # One row of the table: each text's column has what was tuned on all the others.
    for name in sources:
        run(f"all but {name}", [other for other in sources if other != name], [name])
    others = {name: results.pop(f"all but {name}")[name] for name in sources}
    results["all but the one tested"] = others
    document = table(results, list(sources))
    click.echo(document)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "model": profile.model.id,
        "profile": profile.checksum,
        "versions": library_versions(),
        "seconds": round(time.monotonic() - began),
        "tokens": {
            name: {part: getattr(text.split, part).reading.tokens for part in ("train", "validation", "test")}
            for name, text in read.items()
        },
        "found": found,
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "table.md").write_text(document + "\n")
    click.echo(f"Written: {out / 'results.json'}, {out / 'table.md'}")


if __name__ == "__main__":
    main()
