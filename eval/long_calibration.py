"""Calibration on millions of tokens: does memory stay flat, and are running statistics what two passes in float64 give?

Of some neurons, every activation and every effect that calibration adds up is also written to a file. From that file the
same means, standard deviations and standard errors are computed again, the plain way: all values at hand, first the mean,
then the deviations from it.

    python eval/long_calibration.py --tokens 5000000 --text books --json eval/long_calibration.json
"""

from __future__ import annotations

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

from confsteer import Profile
from confsteer.calibration import stages
from confsteer.calibration.calibrate import calibrate
from confsteer.discovery import streaming
from confsteer.discovery.exact import TokenEffects, TokenSlopes
from confsteer.discovery.streaming import ActivationMoments, EffectMeans, NeuronEffects
from confsteer.model.loading import DEMO_UNIGRAM, load_model
from confsteer.text.counts import read_counts
from confsteer.text.sources import TextSource

PASSES = ("activations", "effects", "responses")


class Diary:
    """What calibration adds up of a few neurons, and the memory it has at that moment."""

    def __init__(self, folder: Path, neurons: list[int]) -> None:
        self.folder, self.neurons = folder, neurons
        self.resident: dict[str, list[int]] = {name: [] for name in PASSES}
        """By pass, resident bytes after each batch."""
        self._windows = 0

    def note(self, stage: str, columns: dict[str, Tensor]) -> None:
        for name, column in columns.items():
            with (self.folder / f"{stage}.{name}").open("ab") as file:
                file.write(column.double().cpu().numpy().tobytes())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident[stage].append(pages * os.sysconf("SC_PAGE_SIZE"))

    def read(self, stage: str, name: str) -> NDArray[np.float64]:
        """``[tokens, neurons]``"""
        return np.fromfile(self.folder / f"{stage}.{name}").reshape(-1, len(self.neurons))

    def moments(self) -> type[ActivationMoments]:
        diary = self

        class Moments(ActivationMoments):
            def update(self, activations: Tensor) -> None:
                super().update(activations)
                diary.note("activations", {"activation": activations[:, diary.neurons]})

        return Moments

    def means(self) -> type[EffectMeans]:
        diary = self

        class Means(EffectMeans):
            def update(self, effects: TokenEffects, window: Tensor, slopes: TokenSlopes | None = None) -> None:
                super().update(effects, window, slopes)
                if slopes is None:  # the third pass, of the reported neurons
                    diary.note("responses", {})
                    return
                columns = {**effects._asdict(), **{f"{name}_slope": column for name, column in slopes._asdict().items()}}
                columns = {name: column[:, diary.neurons] for name, column in columns.items()}
                numbered = (window + diary._windows)[:, None].expand(-1, len(diary.neurons))
                diary._windows += int(window.max()) + 1
                diary.note("effects", {**columns, "window": numbered})

        return Means


def two_passes(diary: Diary) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Mean (or share of the total) and standard deviation (or standard error over windows) of each statistic, ``[neurons]``."""
    activation = diary.read("activations", "activation")
    found = {"activation": (activation.mean(axis=0), activation.std(axis=0, ddof=1))}
    _, window = np.unique(diary.read("effects", "window")[:, 0], return_inverse=True)
    n_windows = int(window.max()) + 1

    def over_windows(deviation: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.stack([np.bincount(window, weights=column) for column in deviation.T], axis=1)
        squares: NDArray[np.float64] = np.square(sums).sum(axis=0)
        return np.sqrt(n_windows / (n_windows - 1) * squares)

    columns: dict[str, Callable[[], NDArray[np.float64]]] = {
        "total": lambda: np.abs(diary.read("effects", "loss")),
        "direct": lambda: np.abs(diary.read("effects", "direct_loss")),
        "loss": lambda: diary.read("effects", "loss"),
        "entropy": lambda: diary.read("effects", "entropy"),
        "entropy_abs": lambda: np.abs(diary.read("effects", "entropy")),
        "frequency": lambda: np.abs(diary.read("effects", "frequency_kl")),
        "entropy_slope": lambda: diary.read("effects", "entropy_slope"),
        "unigram_slope": lambda: -diary.read("effects", "unigram_kl_slope"),
    }
    for name, column in columns.items():
        values = column()
        mean = values.mean(axis=0)
        found[name] = mean, over_windows(values - mean) / len(values)
    total = columns["total"]()
    for name, field in (("mediation", "direct_loss"), ("frequency_mediation", "loss_without_frequency")):
        part = np.abs(diary.read("effects", field))
        share = part.sum(axis=0) / total.sum(axis=0)
        found[name] = 1 - share, over_windows(part - share * total) / total.sum(axis=0)
    return found


def differences(profile: Profile, diary: Diary) -> dict[str, tuple[float, float]]:
    """Largest relative difference of mean and spread between the profile and two passes, over the neurons, by statistic."""
    reference = two_passes(diary)
    names = {"activation": ("mean_activation", "std_activation")}
    names |= {name: (name, f"{name}_standard_error") for name in NeuronEffects._fields}
    return {
        name: tuple(
            float(np.max(np.abs(profile.columns[column].numpy()[diary.neurons] / expected - 1)))
            for column, expected in zip(names[name], reference[name], strict=True)
        )  # type: ignore[misc]
        for name in names
    }


def memory_by_tenth(resident: list[int]) -> list[int]:
    """Highest resident bytes in each tenth of a pass's batches, or at each batch if there are fewer than ten."""
    return [int(tenth.max()) for tenth in np.array_split(resident, min(10, len(resident)))]


@click.command()
@click.option("--text", multiple=True, type=click.Path(exists=True, path_type=Path), required=True, help="Files and folders.")
@click.option("--tokens", default=5_000_000, show_default=True)
@click.option("--neurons", default=8, show_default=True, help="Neurons to write down: half of them entropy neurons.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Where results go.")
def main(text: tuple[Path, ...], tokens: int, neurons: int, json_file: Path | None) -> None:
    """Calibrate the bundled model on much text."""
    loaded, shipped = load_model(None), Profile.load("confsteer-demo")
    windows = TextSource(text=text, join=True).windows(loaded.tokenizer, 256, tokens)
    click.echo(f"{windows.n_tokens:,} tokens, {len(windows):,} windows")
    listed = [n.index for n in shipped.entropy_neurons[: neurons // 2]]
    others = torch.randperm(shipped.model.n_neurons, generator=torch.Generator().manual_seed(0)).tolist()
    watched = listed + [i for i in others if i not in listed][: neurons - len(listed)]
    with tempfile.TemporaryDirectory() as folder:
        diary = Diary(Path(folder), watched)
        started, processor = time.monotonic(), time.process_time()
        with (
            mock.patch.object(stages, "ActivationMoments", diary.moments()),
            mock.patch.object(stages, "EffectMeans", diary.means()),
            mock.patch.object(streaming, "EffectMeans", diary.means()),
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
        "largest_relative_difference": {name: {"mean": m, "spread": s} for name, (m, s) in found.items()},
        "entropy_neurons": [n.index for n in profile.entropy_neurons],
        "frequency_neurons": [n.index for n in profile.frequency_neurons],
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for name, tenths in memory.items():
        click.echo(f"{name:12} resident GB by tenth of the pass: {' '.join(f'{b / 1e9:.2f}' for b in tenths)}")
    for name, (m, s) in found.items():
        click.echo(f"{name:20} off by at most {m:.1e} (mean), {s:.1e} (spread)")
    click.echo(f"{wall:,.0f} s, peak {peak / 1e9:.2f} GB")
    if json_file:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
