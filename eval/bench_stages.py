"""Where the time and the memory of a calibration go on real models, stage by stage, beside what cannot be avoided.

    python eval/fetch_model.py smollm2            # the models, see real_models.json
    python eval/bench_stages.py real-models/SmolLM2-135M-Instruct.Q4_1.gguf --text valid.txt
    python eval/bench_stages.py MODEL ... --text FILE --device cuda --tokens 100000

The lower bound is of this machine: the forward pass and the matrix products over the vocabulary, as fast as it does them alone.
One process a model, so that peaks of memory are each model's own.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor

import confsteer
from confsteer.calibration import calibrate as calibration
from confsteer.calibration.stages import fold_layer
from confsteer.last_layer.readout import Readout
from confsteer.model.loading import load_model
from confsteer.text.windows import make_windows

STAGES = {
    "fold_layer": "weights",
    "measure_activations": "activations (forward pass)",
    "measure_sample": "all neurons on the sample",
    "measure_contenders": "contenders on all tokens",
    "measure_responses": "responses on the sample",
    "other_null_spaces": "other null spaces",
}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(seconds: dict[str, float], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = run(*args, **kwargs)
        synchronise()
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return result

    return wrapper


def products_seconds(readout: Readout, tokens: int) -> float:
    """Time of the logits of so many tokens, by 512 of them."""
    few = torch.randn(512, readout.d_model, device=readout.unembedding.device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for rows in readout.unembedding.split(8192):
            few @ rows.T
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times) * tokens / len(few)


def measure(model: str, text: Path, tokens: int, device: str) -> dict[str, Any]:
    """Calibrate once, in this process."""
    start = time.perf_counter()
    loaded = load_model(model, device=device)
    load_seconds = time.perf_counter() - start
    windows = make_windows(confsteer.read_texts([text]), loaded.tokenizer, max_tokens=tokens, source=text.name)
    seconds: dict[str, float] = {}
    for name in STAGES:
        setattr(calibration, name, timed(seconds, name, getattr(calibration, name)))
    readouts: list[Readout] = []
    fold = timed(seconds, "fold_layer", fold_layer)

    def keep(readout: Readout, *args: Any, **kwargs: Any) -> Any:
        readouts.append(readout)
        return fold(readout, *args, **kwargs)

    vars(calibration)["fold_layer"] = keep
    start = time.perf_counter()
    profile = confsteer.calibrate(loaded.model, loaded.tokenizer, windows)
    synchronise()
    whole = time.perf_counter() - start
    # What cannot be avoided: one forward pass, and the logits of every token once.
    ids: Tensor = next(iter(windows.batches(4))).input_ids.to(loaded.model.device)
    forward = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            loaded.model.base_model(input_ids=ids, use_cache=False)
            synchronise()
            forward.append(time.perf_counter() - start)
    bound = min(forward) * windows.n_tokens / ids.numel() + products_seconds(readouts[0], windows.n_tokens)
    usage, on_tokens = resource.getrusage(resource.RUSAGE_SELF), profile.columns["effect_tokens"]
    return {
        "seconds": whole,
        "load_seconds": load_seconds,
        "stages": {STAGES[name]: value for name, value in seconds.items()},
        "bound_seconds": bound,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss / 2**20,
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None,
        "entropy_neurons": [f"{n.layer}.{n.index}" for n in profile.entropy_neurons],
        "frequency_neurons": [f"{n.layer}.{n.index}" for n in profile.frequency_neurons],
        "contenders": int(on_tokens.eq(on_tokens.max()).sum()),
        "reach": {dial: profile.reach(dial) for dial in profile.response},
    }


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        subprocess.run([sys.executable, __file__, *arguments, "--row", str(out)], check=True)
        row: dict[str, Any] = json.loads(out.read_text())
    return row


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True, help="Text to calibrate on.")
@click.option("--tokens", default=25_600, show_default=True, help="Tokens of it.")
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--runs", default=3, show_default=True, help="Medians of so many.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
@click.option("--row", type=click.Path(path_type=Path, dir_okay=False), hidden=True)
def main(models: tuple[str, ...], text: Path, tokens: int, device: str, runs: int, out: Path, row: Path | None) -> None:
    """Time and memory of `confsteer calibrate` on MODELS, by stage."""
    if row is not None:
        row.write_text(json.dumps(measure(models[0], text, tokens, device)))
        return
    rows: dict[str, Any] = {}
    for model in models:
        repeated = [in_a_process([model, "--text", str(text), "--tokens", str(tokens), "--device", device]) for _ in range(runs)]
        median = min(repeated, key=lambda one: abs(one["seconds"] - statistics.median(r["seconds"] for r in repeated)))
        rows[Path(model).name] = median | {"all_seconds": [round(one["seconds"], 1) for one in repeated]}
        click.echo(f"{model}: {json.dumps(rows[Path(model).name], indent=1)}")
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {**versions, **machine, "device": device, "tokens": tokens, "text": text.name, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
