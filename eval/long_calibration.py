"""Calibration on millions of tokens: does memory stay flat, and are running statistics what two passes in float64 give?

Of some neurons, every activation and every effect that calibration adds up is also written to a file: effects on the sample, and
of contenders on all tokens too. From that file the same means, standard deviations and standard errors are computed again, the
plain way: all values at hand, first the mean, then the deviations from it.

    python eval/long_calibration.py --tokens 5000000 --text books --json eval/long_calibration.json

Without --text it reads the Python documentation, over and over.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from confsteer import Profile, demo
from confsteer.calibration import stages
from confsteer.calibration.calibrate import calibrate
from confsteer.discovery import groups, streaming
from confsteer.discovery.response import ResponseCurve
from confsteer.discovery.streaming import ActivationMoments, EffectMeans, ExactEffectMeans, NeuronEffects
from confsteer.discovery.token_effects import TokenEffects, TokenSlopes
from confsteer.last_layer.readout import FullOutputs
from confsteer.model.loading import DEMO_UNIGRAM, load_model
from confsteer.text.counts import read_counts
from confsteer.text.sources import TextSource
from confsteer.text.windows import Windows, make_windows

PASSES = ("activations", "effects", "contenders", "responses")
SHARES = ("mediation", "norm_share", "frequency_mediation")
"""Statistics between 0 and 1, whose differences are not divided by them: the spread of a share that is 1 is rounding."""
WINDOW = 256


class Diary:
    """What calibration adds up of a few neurons, and the memory it has at that moment."""

    def __init__(self, folder: Path, neurons: list[int]) -> None:
        self.folder, self.neurons = folder, neurons
        self.resident: dict[str, list[int]] = {name: [] for name in PASSES}
        """By pass, resident bytes after each batch."""
        self.contenders: list[int] = []
        """Those that the third pass is of, in its order."""
        self._windows = dict.fromkeys(PASSES, 0)

    def note(self, stage: str, columns: dict[str, Tensor]) -> None:
        for name, column in columns.items():
            with (self.folder / f"{stage}.{name}").open("ab") as file:
                file.write(column.double().cpu().numpy().tobytes())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident[stage].append(pages * os.sysconf("SC_PAGE_SIZE"))

    def note_effects(self, stage: str, here: list[int], effects: TokenEffects, slopes: TokenSlopes, window: Tensor) -> None:
        """Write down the effects of the neurons at the places `here`."""
        columns = {**effects._asdict(), **{f"{name}_slope": column for name, column in slopes._asdict().items()}}
        numbered = (window + self._windows[stage])[:, None]
        self._windows[stage] += int(window.max()) + 1
        self.note(stage, {**{name: column[:, here] for name, column in columns.items()}, "window": numbered})

    def read(self, stage: str, name: str, width: int) -> NDArray[np.float64]:
        """``[tokens, width]``"""
        return np.fromfile(self.folder / f"{stage}.{name}").reshape(-1, width)

    def moments(self) -> type[ActivationMoments]:
        diary = self

        class Moments(ActivationMoments):
            def update(self, activations: Tensor) -> None:
                super().update(activations)
                diary.note("activations", {"activation": activations[:, diary.neurons]})

        return Moments

    def means(self, stage: str) -> type[EffectMeans]:
        diary = self

        class Means(EffectMeans):
            def update(
                self, effects: TokenEffects, window: Tensor, slopes: TokenSlopes | None = None, *, among: Tensor | None = None
            ) -> None:
                super().update(effects, window, slopes, among=among)
                if slopes is not None:  # else before a softcap
                    diary.note_effects(stage, diary.places(stage), effects, slopes, window)

        return Means

    def exact_means(self) -> type[ExactEffectMeans]:
        diary = self

        class ExactMeans(ExactEffectMeans):
            def __init__(self, readout: Any, neurons: Tensor, *rest: Any) -> None:
                super().__init__(readout, neurons, *rest)
                diary.contenders = neurons.tolist()

        return ExactMeans

    def curve(self) -> type[ResponseCurve]:
        diary = self

        class Curve(ResponseCurve):
            def update(self, outputs: FullOutputs, active: Tensor | None = None) -> None:
                super().update(outputs, active)
                diary.note("responses", {})

        return Curve

    def watched(self, stage: str) -> list[int]:
        """Neurons that the profile has from a pass: contenders from the third, the others from the second."""
        return [i for i in self.neurons if (i in self.contenders) == (stage == "contenders")]

    def places(self, stage: str) -> list[int]:
        """Where a pass has its `watched`; in the second pass nobody knows yet who will be a contender, so all are written."""
        return [self.contenders.index(i) for i in self.watched(stage)] if stage == "contenders" else self.neurons


Statistics = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""By name, mean (or share of the total) and standard deviation (or standard error over windows), ``[neurons]`` each."""


def two_passes_over_effects(diary: Diary, stage: str) -> Statistics:
    """Statistics of the effects of `Diary.watched`, from all values at hand."""
    written = diary.watched(stage) if stage == "contenders" else diary.neurons
    kept = [written.index(i) for i in diary.watched(stage)]
    _, window = np.unique(diary.read(stage, "window", 1)[:, 0], return_inverse=True)
    n_windows = int(window.max()) + 1

    def read(name: str) -> NDArray[np.float64]:
        return diary.read(stage, name, len(written))[:, kept]

    def over_windows(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.stack([np.bincount(window, weights=column) for column in deviation.T], axis=1)
        squares: NDArray[np.float64] = np.square(sums).sum(axis=0)
        return np.sqrt(n_windows / (n_windows - 1) * squares)

    def norm_part() -> NDArray[np.float64]:
        return read("entropy") - read("direct_entropy")

    def write_norm_part() -> NDArray[np.float64]:
        return read("direct_entropy") - read("straight_entropy")

    columns: dict[str, Callable[[], NDArray[np.float64]]] = {
        "total": lambda: np.abs(read("loss")),
        "direct": lambda: np.abs(read("direct_loss")),
        "loss": lambda: read("loss"),
        "entropy": lambda: read("entropy"),
        "entropy_abs": lambda: np.abs(read("entropy")),
        "entropy_norm": norm_part,
        "entropy_write_norm": write_norm_part,
        "entropy_straight": lambda: read("straight_entropy"),
        "frequency": lambda: np.abs(read("frequency_kl")),
        "entropy_slope": lambda: read("entropy_slope"),
        "unigram_slope": lambda: -read("unigram_kl_slope"),
    }
    found: Statistics = {}
    for name, column in columns.items():
        values = column()
        mean = values.mean(axis=0)
        found[name] = mean, over_windows(values - mean) / len(values)

    def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ratio = part.sum(axis=0) / whole.sum(axis=0)
        return ratio, over_windows(part - ratio * whole) / whole.sum(axis=0)

    for name, field in (("mediation", "direct_loss"), ("frequency_mediation", "loss_without_frequency")):
        rest, spread = share(np.abs(read(field)), columns["total"]())
        found[name] = 1 - rest, spread
    parts = [np.abs(part) for part in (norm_part(), write_norm_part(), read("straight_entropy"))]
    found["norm_share"] = share(parts[0], parts[0] + parts[1] + parts[2])
    return found


def differences(profile: Profile, diary: Diary) -> dict[str, tuple[float, float]]:
    """Largest difference of mean and spread between the profile and two passes, over the neurons, by statistic; see `SHARES`."""
    activation = diary.read("activations", "activation", len(diary.neurons))
    expected = {"activation": (activation.mean(axis=0), activation.std(axis=0, ddof=1))}
    found = {"activation": _largest(profile, ("mean_activation", "std_activation"), diary.neurons, expected["activation"])}
    for stage in ("effects", "contenders"):
        if not (neurons := diary.watched(stage)):
            continue
        reference = two_passes_over_effects(diary, stage)
        for name in NeuronEffects._fields:
            columns = (name, f"{name}_standard_error")
            found[f"{name}, {stage}"] = _largest(profile, columns, neurons, reference[name], relative=name not in SHARES)
    return found


def _largest(
    profile: Profile,
    columns: tuple[str, str],
    neurons: list[int],
    expected: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    relative: bool = True,
) -> tuple[float, float]:
    ours = [profile.columns[column].numpy()[neurons] for column in columns]
    off = [np.abs(a - b) / np.where(relative & (b != 0), np.abs(b), 1) for a, b in zip(ours, expected, strict=True)]
    return float(off[0].max()), float(off[1].max())


def memory_by_tenth(resident: list[int]) -> list[int]:
    """Highest resident bytes in each tenth of a pass's batches, or at each batch if there are fewer than ten."""
    return [int(tenth.max()) for tenth in np.array_split(resident, min(10, len(resident)))]


def read_windows(text: tuple[Path, ...], tokens: int) -> Windows:
    """The files, or the Python documentation over and over."""
    tokenizer = load_model(None).tokenizer
    if text:
        return TextSource(text=text, join=True).windows(tokenizer, WINDOW, tokens)
    documents = itertools.cycle([*demo.texts("calibration"), *demo.texts("held-out")])
    return make_windows(documents, tokenizer, window=WINDOW, max_tokens=tokens, source="Python documentation")


@click.command()
@click.option("--text", multiple=True, type=click.Path(exists=True, path_type=Path), help="Files and folders.")
@click.option("--tokens", default=5_000_000, show_default=True)
@click.option("--neurons", default=8, show_default=True, help="Neurons to write down: half of them entropy neurons.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where results go.")
def main(text: tuple[Path, ...], tokens: int, neurons: int, json_file: Path | None) -> None:
    """Calibrate the bundled model on much text."""
    loaded, shipped = load_model(None), Profile.load("confsteer-demo")
    windows = read_windows(text, tokens)
    click.echo(f"{windows.n_tokens:,} tokens, {len(windows):,} windows")
    listed = [n.index for n in shipped.entropy_neurons[: neurons // 2]]
    others = torch.randperm(shipped.model.n_neurons, generator=torch.Generator().manual_seed(0)).tolist()
    watched = listed + [i for i in others if i not in listed][: neurons - len(listed)]
    with tempfile.TemporaryDirectory() as folder:
        diary = Diary(Path(folder), watched)
        started, processor = time.monotonic(), time.process_time()
        with (
            mock.patch.object(groups, "ActivationMoments", diary.moments()),
            mock.patch.object(groups, "EffectMeans", diary.means("effects")),
            mock.patch.object(groups, "ExactEffectMeans", diary.exact_means()),
            mock.patch.object(streaming, "EffectMeans", diary.means("contenders")),
            mock.patch.object(stages, "ResponseCurve", diary.curve()),
        ):
            profile = calibrate(loaded.model, loaded.tokenizer, windows, unigram_counts=read_counts(DEMO_UNIGRAM), progress=True)
        wall, processor = time.monotonic() - started, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = differences(profile, diary)
        memory = {name: memory_by_tenth(diary.resident[name]) for name in PASSES}
    assert profile.corpus is not None
    results: dict[str, Any] = {
        "tokens": windows.n_tokens,
        "kept_tokens": profile.corpus.kept_tokens,
        "windows": len(windows),
        "seconds": round(wall, 1),
        "processor_seconds": round(processor, 1),
        "threads": torch.get_num_threads(),
        "peak_bytes": peak,
        "resident_bytes_by_tenth": memory,
        "neurons": watched,
        "contenders": diary.contenders,
        "largest_difference": {name: {"mean": m, "spread": s} for name, (m, s) in found.items()},
        "entropy_neurons": [n.index for n in profile.entropy_neurons],
        "frequency_neurons": [n.index for n in profile.frequency_neurons],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for name, tenths in memory.items():
        click.echo(f"{name:12} resident GB by tenth of the pass: {' '.join(f'{b / 1e9:.2f}' for b in tenths)}")
    for name, (m, s) in found.items():
        click.echo(f"{name:32} off by at most {m:.1e} (mean), {s:.1e} (spread)")
    click.echo(f"{wall:,.0f} s, peak {peak / 1e9:.2f} GB")
    if json_file:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
