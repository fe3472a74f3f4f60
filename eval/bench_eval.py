"""Time and memory of `confsteer eval` and `confsteer tune` on a real model, stage by stage, beside what cannot be avoided.

The lower bound is one forward pass, one product with the unembedding for each token (twice: fits come between two passes), and
one exponential for each token of the vocabulary, each token of the text and each row. Their rates are measured here, by a product
with the model's own unembedding and by exponentials within a core's cache.

    python eval/bench_eval.py MODEL.gguf -p PROFILE --text wiki.txt -s entropy=0.3 -s entropy=1
    python eval/bench_eval.py MODEL.gguf -p PROFILE --text wiki.txt --text docs.txt --tune --tokens 5600

Results are added to bench_eval.json, by model and command.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import transformers

import confsteer.evaluation.comparison
import confsteer.evaluation.evaluate
import confsteer.tuning.tune
from confsteer import Profile
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.readout import CACHED_SET
from confsteer.last_layer.text_states import MIN_ROWS, TextStates
from confsteer.model.dissect import dissect
from confsteer.model.loading import load_model
from confsteer.steering import Steering
from confsteer.text.sources import TextSource, by_title

STAGES = (
    (Reader, "__init__", "fold the last layer"),
    (Reader, "read", "forward pass"),
    (TextStates, "predict", "passes over the vocabulary"),
    (confsteer.evaluation.evaluate, "fit_temperature", "fit temperatures"),
    (confsteer.tuning.tune, "fit_temperature", "fit temperatures"),
    (confsteer.evaluation.evaluate, "fit_null_write", "fit constants"),
    (confsteer.tuning.tune, "fit_null_write", "fit constants"),
    (confsteer.evaluation.evaluate, "match_entropy", "match entropies"),
    (confsteer.tuning.tune, "search", "search"),
    (confsteer.evaluation.comparison, "token_metrics", "metrics"),
    (confsteer.evaluation.comparison, "reliability_bins", "metrics"),
)
"""Functions that take the time, which do not call each other, and what they are called in the table."""


class Stopwatch:
    """Seconds spent in functions of others."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Time every call of a function or method, where it is looked up."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **keywords: Any) -> Any:
            return self.time(stage, functools.partial(function, *args, **keywords))

        setattr(owner, name, timed)

    def time(self, stage: str, function: Callable[[], Any]) -> Any:
        """Call a function and add its time to a stage."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        self.wall[stage] = self.wall.get(stage, 0.0) + time.perf_counter() - wall
        self.cpu[stage] = self.cpu.get(stage, 0.0) + time.process_time() - cpu
        return result


def fastest(function: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of several calls."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def rates(unembedding: torch.Tensor) -> tuple[float, float]:
    """This machine's FLOP and exponentials per second."""
    block, logits = torch.randn(MIN_ROWS, unembedding.shape[1]), torch.empty(MIN_ROWS, len(unembedding))
    product = fastest(lambda: torch.mm(block, unembedding.T, out=logits))
    values = torch.randn(torch.get_num_threads(), CACHED_SET)
    out = torch.empty_like(values)
    exponentials = fastest(lambda: torch.softmax(values, dim=-1, out=out))
    return 2 * MIN_ROWS * unembedding.numel() / product, values.numel() / exponentials


def lower_bound(model: Any, tokens: int, rows: int, passes: float) -> dict[str, float]:
    """Seconds that cannot be avoided.

    Args:
        model: the model.
        tokens: tokens of all texts.
        rows: ways to predict.
        passes: products with the unembedding for each token.
    """
    unembedding = dissect(model).unembedding.get_parameter("weight").detach().float()
    flops, exponentials = rates(unembedding)
    embeddings = {
        id(p): p.numel() for p in (*model.get_input_embeddings().parameters(), *dissect(model).unembedding.parameters())
    }
    body = sum(parameter.numel() for parameter in model.parameters()) - sum(embeddings.values())
    return {
        "gflops_measured": flops / 1e9,
        "gexp_measured": exponentials / 1e9,
        "forward pass": 2 * body * tokens / flops,
        "products with the unembedding": passes * 2 * unembedding.numel() * tokens / flops,
        "exponentials": rows * len(unembedding) * tokens / exponentials,
    }


@click.command()
@click.argument("model")
@click.option("-p", "--profile", "profile_name", required=True)
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-s", "--steer", "steerings", multiple=True)
@click.option("--tokens", default=8_000, show_default=True, help="Read at most this many of each text.")
@click.option("--window", default=256, show_default=True)
@click.option("--tune", is_flag=True, help="Time tune instead of eval.")
@click.option("--remark", default="", help="What else the machine did meanwhile, for the record.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
def main(
    model: str,
    profile_name: str,
    texts: tuple[Path, ...],
    steerings: tuple[str, ...],
    tokens: int,
    window: int,
    tune: bool,
    remark: str,
    out: Path,
) -> None:
    """Evaluate or tune MODEL once and write what took how long."""
    stopwatch, began, load = Stopwatch(), time.perf_counter(), os.getloadavg()[0]
    for owner, name, stage in STAGES:
        stopwatch.watch(owner, name, stage)
    loaded = stopwatch.time("load", lambda: load_model(model))
    profile = Profile.load(profile_name)
    sources = by_title([TextSource(text=(text,)) for text in texts])
    windows = {title: source.windows(loaded.tokenizer, window, tokens) for title, source in sources.items()}
    found: dict[str, Any]
    if tune:
        tuning = confsteer.tuning.tune.tune(loaded.model, loaded.tokenizer, windows, profile, progress=True)
        read, rows = sum(tuning.tokens.values()), 2
        found = {"steps": tuning.steps, "validation": tuning.validation}
    else:
        asked = [Steering.parse(text) for text in steerings]
        evaluation = confsteer.evaluation.evaluate.evaluate(
            loaded.model, loaded.tokenizer, windows, profile, asked, progress=True
        )
        read, rows = sum(text.tokens for text in evaluation.texts), 3 + 2 * len(asked)
        found = {row.name: row.metrics["loss"].value for row in evaluation.texts[0].rows}
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Tuning samples the vocabulary or judges in one pass, and passes once more over the fifth of the text that it reports on.
    bound = lower_bound(loaded.model, read, rows, 1.2 if tune else 2)
    record = {
        "command": "tune" if tune else "eval",
        "model": Path(model).name,
        "tokens": read,
        "texts": len(texts),
        "steerings": list(steerings),
        "neurons": len(profile.steerable),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gb": peak / 2**20,
        "stages": {stage: {"seconds": stopwatch.wall[stage], "cpu_seconds": stopwatch.cpu[stage]} for stage in stopwatch.wall},
        "lower_bound": bound,
        "found": found,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "remark": remark,
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    show(record)
    key = f"{record['command']} {record['model']}"
    everything = json.loads(out.read_text()) if out.exists() else {}
    everything[key] = json.loads(json.dumps(record), parse_float=lambda number: float(f"{float(number):.5g}"))
    out.write_text(json.dumps(everything, indent=1) + "\n")


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    click.echo(f"{record['command']} of {record['model']}: {record['tokens']:,} tokens, {record['neurons']} neurons")
    click.echo("| stage | seconds | CPU-seconds |\n|---|---|---|")
    for stage, taken in record["stages"].items():
        click.echo(f"| {stage} | {taken['seconds']:.1f} | {taken['cpu_seconds']:.1f} |")
    click.echo(f"| all | {record['seconds']:.1f} | {record['cpu_seconds']:.1f} |")
    click.echo(f"peak memory {record['peak_gb']:.2f} GB; cannot be avoided:")
    for name, value in record["lower_bound"].items():
        click.echo(f"  {name}: {value:.1f}")


if __name__ == "__main__":
    main()
