"""Is a tuned steering more than a temperature, on text of a kind that it was tuned on and on text of another kind?

    python eval/study_calibration_texts.py CORPORA TEXTS          # five texts, as JSON lists of documents
    python eval/study_calibration.py MODEL.gguf --profile PROFILE --texts TEXTS
    python eval/study_calibration.py --draw eval/study_calibration/*/results.json

Every text is cut in three, whole documents together: the first part to fit to, of which a sample of tokens is used, the second to
say when to stop, and the third, which is judged. What is judged was fitted to the text itself, or to all the others. Ways:

- ``temperature``: one number for all tokens.
- ``entropy dial``: one number; the entropy neurons pushed together.
- ``entropy neurons``: a gain and a shift of each of the profile's; ``all its neurons``: with the token-frequency neurons, if any.
- ``random neurons``: as many as there are entropy neurons, each drawn out of the ten nearest in norm.
- ``all candidates``: every neuron whose weights let it be an entropy neuron.

Beside each stands the temperature at which the unsteered model has the same mean entropy on the judged part. Writes
``results.json``, with intervals, and ``table.md`` to the folder OUT. Without MODEL the bundled model is studied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from confsteer import ConfsteerError, Profile, defaults
from confsteer.discovery.select import candidates
from confsteer.evaluation.comparison import Candidate, Sample, compare
from confsteer.evaluation.evaluate import read_sample, unsteered, with_matched_temperatures
from confsteer.evaluation.fit import fit_temperature
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.coordinates import Writes
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.unigram import Unigram
from confsteer.model.loading import DEMO_NAME, LoadedModel, load_model
from confsteer.profile.schema import library_versions
from confsteer.studies.cumulative import draw_controls
from confsteer.text.sources import read_texts
from confsteer.text.windows import Document, Windows, make_windows
from confsteer.tuning.splits import Split, share_out
from confsteer.tuning.tune import Parameters, Tuned, search

SHARES = (0.35, 0.15, 0.5)
"""Of a text, to fit to, to stop by and to judge."""
METRICS = ("loss", "ece", "ece_equal_mass", "brier", "entropy", "accuracy")
"""Those that are kept."""
ROUNDING = 5e-5
"""Differences below it are shown as zero."""
FITTED_TO = ("itself", "the others")


class Neurons(NamedTuple):
    """Neurons to tune, as a profile that has no others."""

    profile: Profile
    places: torch.Tensor
    """Among the neurons that texts were read with, ``[n]``."""
    writes: Writes


class Settings(NamedTuple):
    """Numbers of tokens of each text, and the seed."""

    tokens: int
    window: int
    fit: int
    stop: int
    seed: int


class Text(NamedTuple):
    """A text that was read, in three parts."""

    train: Sample
    stop: Sample
    judged: Sample
    unigram: Unigram


class Way(NamedTuple):
    """Numbers that are tuned: the positions of a dial, or the gains and shifts of some neurons."""

    parameters: Parameters
    neurons: Neurons


class Clock:
    """Seconds that each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def stage(self, name: str) -> None:
        """End a stage, and begin the next."""
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0) + now - self._began, 1)
        click.echo(f"{now - self._began:6.1f} s  {name}")
        self._began = now


def with_neurons(profile: Profile, indices: Sequence[int]) -> Profile:
    """The profile with these as its only neurons, on the entropy dial if they were on it before."""
    known, columns = {neuron.index: neuron for neuron in profile.steerable}, profile.columns
    like = profile.steerable[0]
    neurons = tuple(
        known.get(i)
        or like.model_copy(
            update={
                "index": i,
                "mean_activation": float(columns["mean_activation"][i]),
                "std_activation": float(columns["std_activation"][i]),
            }
        )
        for i in indices
    )
    response = {"entropy": profile.response["entropy"]}
    return profile.model_copy(
        update={"entropy_neurons": neurons, "frequency_neurons": (), "response": response, "responses_by_text": {}}
    )


def choose_neurons(profile: Profile, seed: int) -> dict[str, list[int]]:
    """The sets of neurons that are tuned, by name."""
    own = [neuron.index for neuron in profile.entropy_neurons]
    every = [neuron.index for neuron in profile.steerable]
    possible = candidates(profile.weights)
    dead = (profile.columns["std_activation"] == 0).nonzero()[:, 0].tolist()
    excluded = {*every, *possible, *dead}
    drawn = draw_controls(profile.columns["norm"].numpy(), own, np.random.default_rng(seed), excluding=excluded)
    sets = {"entropy neurons": own, "random neurons": drawn, "all candidates": sorted({*own, *possible})}
    if len(every) > len(own):
        sets["all its neurons"] = every
    return sets


def thinned(sample: Sample, tokens: int) -> Sample:
    """About as many tokens, spread evenly."""
    rows = torch.arange(0, sample.reading.tokens, max(1, sample.reading.tokens // tokens))
    return sample._replace(reading=sample.reading.at(rows), block=sample.block[rows])


def with_only(text: Text, neurons: Neurons) -> Split:
    """The parts of a text that are searched on, with some of its neurons; they stand for those that are not."""

    def only(sample: Sample) -> Sample:
        return sample._replace(reading=sample.reading.of_neurons(neurons.places, neurons.writes))

    train, stop = only(text.train), only(text.stop)
    return Split(train, stop, stop, stop, text.unigram)


def everywhere(intervention: Intervention, neurons: Neurons, total: int) -> Intervention:
    """An intervention on some neurons as one on all that texts were read with."""
    whole = Intervention.neutral(total)
    columns = [wide.clone() for wide in whole[:4]]
    for wide, narrow in zip(columns, intervention, strict=False):
        wide[neurons.places] = narrow.detach()
    return intervention._replace(**dict(zip(Intervention._fields, columns, strict=False)))


class Fitted(NamedTuple):
    """Everything that was fitted to the same texts."""

    temperature: Intervention
    tuned: dict[str, Tuned]
    """By the name of the way, on all neurons that texts were read with."""


def fit_all(ways: Mapping[str, Way], texts: Sequence[Text]) -> Fitted:
    """Fit every way to texts that count equally."""
    total = texts[0].train.reading.readout.n_neurons
    tuned = {}
    for name, way in ways.items():
        found = search(way.neurons.profile, [with_only(text, way.neurons) for text in texts], way.parameters)
        tuned[name] = found._replace(intervention=everywhere(found.intervention, way.neurons, total))
    return Fitted(fit_temperature([text.train.reading for text in texts]), tuned)


def judge(text: Text, fits: Mapping[str, Fitted]) -> dict[str, dict[str, Any]]:
    """Metrics of every way on the judged part, and their differences, by what they were fitted to."""
    sample, unigram = text.judged, text.unigram
    tuned = [(name, one) for fitted in fits.values() for name, one in fitted.tuned.items()]
    steered = with_matched_temperatures(
        sample, [one.steering for _, one in tuned], [one.intervention for _, one in tuned], [name for name, _ in tuned], unigram
    )
    temperatures = [Candidate("temperature", "temperature", sample.everywhere(one.temperature)) for one in fits.values()]
    neutral, *rest = sample.predict([unsteered(sample), *temperatures, *steered], unigram)
    temperatures, steered = rest[: len(fits)], rest[len(fits) :]
    each = len(steered) // len(fits)
    judged = {}
    for i, name in enumerate(fits):
        rows = compare(sample, [neutral, temperatures[i], *steered[each * i : each * (i + 1)]], unigram).rows
        judged[name] = {
            row.name: {
                "metrics": {metric: row.metrics[metric] for metric in METRICS},
                "minus": {
                    kind: {metric: difference[metric] for metric in METRICS if metric in difference}
                    for kind, difference in row.minus.items()
                    if kind in ("neutral", "temperature", "matched temperature")
                },
                "values": row.values,
            }
            for row in rows
        }
    return judged


def read(reader: Reader, windows: Windows, limits: tuple[int, int], seed: int) -> Text:
    """Run the model over a text once, cut it, and make it ready to be searched on."""
    sample = read_sample(reader, windows)
    *searched, judged = share_out(sample, SHARES, windows.window, seed)
    train, stop = (thinned(part, tokens) for part, tokens in zip(searched, limits, strict=True))
    for part in (train, stop):
        part.reading.draw_sample()
    return Text(train, stop, judged, Unigram.from_counts(windows.counts(reader.profile.model.tokenizer_size)))


def described(text: Text) -> dict[str, Any]:
    """How long the parts are."""
    parts = {"fitted to": text.train, "stopped by": text.stop, "judged": text.judged}
    counted = {name: part.reading.tokens for name, part in parts.items()}
    return {"tokens": counted, "judged units": len(text.judged.block.unique()), "unit": text.judged.unit}


def study(loaded: LoadedModel, profile: Profile, texts: Mapping[str, Iterable[Document]], settings: Settings) -> dict[str, Any]:
    """Read, fit and judge; the record that is written."""
    clock = Clock()
    sets = choose_neurons(profile, settings.seed)
    union = sorted({index for indices in sets.values() for index in indices})
    reader = Reader(loaded.model, with_neurons(profile, union))
    texts_read: dict[str, Text] = {}
    for name, documents in texts.items():
        windows = make_windows(documents, loaded.tokenizer, window=settings.window, max_tokens=settings.tokens, source=name)
        texts_read[name] = read(reader, windows, (settings.fit, settings.stop), settings.seed)
        clock.stage("read")
    null_direction = next(iter(texts_read.values())).judged.reading.null_direction

    def neurons(indices: Sequence[int]) -> Neurons:
        places = torch.tensor([union.index(index) for index in indices])
        few = reader.readout.select(places.to(reader.device))
        return Neurons(with_neurons(profile, indices), places, Writes(few, null_direction))

    ways = {name: Way("neurons", neurons(indices)) for name, indices in sets.items()}
    ways = {"entropy dial": Way("dials", ways["entropy neurons"].neurons), **ways}
    fits: dict[str, dict[str, Fitted]] = {}
    for name, text in texts_read.items():
        others = [other for other in texts_read.values() if other is not text]
        fits[name] = {to: fit_all(ways, chosen) for to, chosen in zip(FITTED_TO, ([text], others), strict=True) if chosen}
        clock.stage("fit")
    judged = {}
    for name, text in texts_read.items():
        judged[name] = judge(text, fits[name])
        clock.stage("judge")
    return {
        "model": profile.model.id,
        "profile": profile.checksum,
        "versions": library_versions(),
        "device": device_name(reader.device),
        "seconds": clock.seconds,
        "settings": settings._asdict(),
        "neurons": sets,
        "texts": {name: described(text) for name, text in texts_read.items()},
        "found": {
            name: {
                to: {way: {"steering": str(tuned.steering), "steps": tuned.steps} for way, tuned in fitted.tuned.items()}
                for to, fitted in by_text.items()
            }
            for name, by_text in fits.items()
        },
        "judged": judged,
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def tables(record: dict[str, Any]) -> str:
    """Markdown of a record."""
    texts, judged = record["texts"], record["judged"]
    names = list(texts)
    ways = [way for way in next(iter(next(iter(judged.values())).values())) if not way.startswith(("neutral", "temperature"))]
    sizes = ", ".join(
        f"{name} {texts[name]['tokens']['judged']:,} ({texts[name]['judged units']} {texts[name]['unit']})" for name in names
    )
    fitted = min(text["tokens"]["fitted to"] for text in texts.values())
    neurons = "; ".join(f"{name}: {len(indices)}" for name, indices in record["neurons"].items())
    head = (
        f"# {record['model']}\n\nMade by `eval/study_calibration.py`, which says what the ways are. Judged tokens: {sizes}. "
        f"Fitted to at least {fitted:,} tokens of a text. Neurons: {neurons}. In brackets: 95 % bootstrap interval of paired "
        "differences, over documents or windows of the judged part; * where it does not contain zero. "
        f"{sum(record['seconds'].values()):.0f} s on {record['device']}."
    )
    parts = [head, "## Without neurons: loss / ECE", unsteered_table(judged, names)]
    for metric, title in (("loss", "Loss, nats"), ("ece", "ECE")):
        parts += [
            f"## {title}: less that of the fitted temperature / of the temperature of the same mean entropy",
            short_table(judged, names, ways, metric),
        ]
    parts += ["## With intervals", long_table(judged, names, ways)]
    return "\n\n".join(parts) + "\n"


def unsteered_table(judged: dict[str, Any], names: Sequence[str]) -> str:
    """Loss and ECE of the unsteered model, and of the temperature fitted to each choice of texts, which is in brackets."""
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]

    def cell(row: dict[str, Any]) -> str:
        loss, ece = (row["metrics"][metric][0] for metric in ("loss", "ece"))
        return f"{loss:.3f} / {ece:.3f}" + "".join(f" (T = {value:.3f})" for value in row["values"])

    lines.append("| unsteered | " + " | ".join(cell(next(iter(judged[name].values()))["neutral"]) for name in names) + " |")
    for to in judged[names[0]]:
        lines.append(
            f"| temperature fitted to {to} | " + " | ".join(cell(judged[name][to]["temperature"]) for name in names) + " |"
        )
    return "\n".join(lines)


def short_table(judged: dict[str, Any], names: Sequence[str], ways: Sequence[str], metric: str) -> str:
    """A row for each way and choice of texts, a column for each text; both differences in each cell."""
    lines = ["| fitted to | way | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for to in judged[names[0]]:
        for way in ways:
            cells = [
                " / ".join(
                    difference(judged[name][to][way]["minus"][kind][metric], intervals=False)
                    for kind in ("temperature", "matched temperature")
                )
                for name in names
            ]
            lines.append(f"| {to if way == ways[0] else ''} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def long_table(judged: dict[str, Any], names: Sequence[str], ways: Sequence[str]) -> str:
    """A row for each text, choice of texts and way, with intervals."""
    columns = ["text", "fitted to", "way", "loss", "− fitted temperature's", "− same entropy's"]
    columns += ["ECE", "− fitted temperature's", "− same entropy's"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---|" + "---:|" * (len(columns) - 3)]
    for name in names:
        for to, rows in judged[name].items():
            for way in ways:
                cells = [name, to, way]
                for metric in ("loss", "ece"):
                    minus = rows[way]["minus"]
                    cells.append(f"{rows[way]['metrics'][metric][0]:.4f}")
                    cells += [difference(minus[kind][metric]) for kind in ("temperature", "matched temperature")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(interval: Sequence[float], *, intervals: bool = True) -> str:
    value, low, high = interval
    # A search that stays at the unsteered model differs from a temperature of one by rounding.
    sure = "*" if (low > 0 or high < 0) and abs(value) >= ROUNDING else ""
    return f"{value:+.4f}{sure} ({low:+.4f} to {high:+.4f})" if intervals else f"{value:+.4f}{sure}"


@click.command()
@click.argument("model", required=False)
@click.option("--profile", "profile_name", default=DEMO_NAME, show_default=True, help="Of MODEL.")
@click.option("--texts", type=click.Path(path_type=Path, exists=True), help="Folder of texts, a file each.")
@click.option("--tokens", default=100_000, show_default=True, help="Read at most this many of each text.")
@click.option("--window", default=defaults.WINDOW, show_default=True, help="Tokens per window.")
@click.option("--fit", default=6_000, show_default=True, help="Fit to about this many of them.")
@click.option("--stop", default=3_000, show_default=True, help="Stop by about this many of them.")
@click.option("--seed", default=0, show_default=True, help="Of the random neurons and of how documents are shared out.")
@click.option("--device", help="cpu or cuda.  [default: CUDA if there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: eval/study_calibration/PROFILE]")
@click.option(
    "--draw", "records", multiple=True, type=click.Path(path_type=Path, exists=True), help="Only write tables, of results.json."
)
def main(
    model: str | None,
    profile_name: str,
    texts: Path | None,
    device: str | None,
    out: Path | None,
    records: tuple[Path, ...],
    **settings: int,
) -> None:
    """Compare temperatures and tuned steerings of MODEL on several texts."""
    for file in records:
        write_tables(file)
    if records:
        return
    if texts is None:
        raise click.UsageError("give some texts: --texts FOLDER")
    try:
        documents = {file.stem: list(read_texts(file)) for file in sorted(texts.iterdir())}
        record = study(load_model(model, device=device), Profile.load(profile_name), documents, Settings(**settings))
    except ConfsteerError as error:
        raise click.ClickException(str(error)) from error
    out = out or Path(__file__).with_suffix("") / Path(profile_name).name
    out.mkdir(parents=True, exist_ok=True)
    # More digits than the intervals allow would be half the file.
    rounded = json.loads(json.dumps(record), parse_float=lambda x: float(f"{float(x):.5g}"))
    (out / "results.json").write_text(json.dumps(rounded, indent=1) + "\n")
    write_tables(out / "results.json")


def write_tables(file: Path) -> None:
    table = file.with_name("table.md")
    table.write_text(tables(json.loads(file.read_text())), encoding="utf-8")
    click.echo(f"Written: {table}")


if __name__ == "__main__":
    main()
