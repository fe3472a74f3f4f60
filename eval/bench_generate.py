"""What steering costs ``generate()``: paired runs of the same generation with and without it, as ratios.

A randomly initialised GPT-2-small-shaped model (124M parameters) on the CPU, batch 1 and 8. The two sides alternate, in
random order within each pair, so that a drifting machine moves both; a pair gives one ratio. The bundled profile's numbers
are put on neurons of this model: what they are does not matter for time.

    python eval/bench_generate.py --pairs 30
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import confsteer
from confsteer import Profile, Steering
from confsteer.model.dissect import dissect
from confsteer.model.loading import DEMO_NAME


def profile_for(model: GPT2LMHeadModel) -> Profile:
    """The bundled profile with this model's identity: the same number of neurons to edit, and dials that work."""
    profile, anatomy = Profile.load(DEMO_NAME), dissect(model)
    sizes = {name: getattr(anatomy, name) for name in ("layer", "n_neurons", "d_model", "vocab_size")}
    identity = profile.model.model_copy(update=sizes | {"fingerprints": anatomy.fingerprints()})
    return profile.model_copy(update={"model": identity})


@click.command()
@click.option("--pairs", default=30, show_default=True)
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
def main(pairs: int, new_tokens: int, out: Path) -> None:
    """Time generate() with and without steering and write the ratios."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    profile = profile_for(model)
    rows = []
    for batch in (1, 8):
        ids = torch.randint(0, 50_257, (batch, 16))
        arguments: dict[str, Any] = {
            "min_new_tokens": new_tokens,
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }

        def seconds(ids: torch.Tensor = ids, arguments: dict[str, Any] = arguments) -> float:
            start = time.perf_counter()
            model.generate(ids, **arguments)
            return time.perf_counter() - start

        for name, steering in (
            ("one steering for the batch", Steering(entropy=0.2)),
            ("one steering per row", [Steering(entropy=0.2 * i / batch) for i in range(batch)]),
        ):
            with confsteer.steer(model, profile, steering):
                seconds()
            ratios, plain_times = [], []
            for _ in range(pairs):
                times = {}
                for steered in rng.permutation([True, False]):
                    if steered:
                        with confsteer.steer(model, profile, steering):
                            times[True] = seconds()
                    else:
                        times[False] = seconds()
                ratios.append(times[True] / times[False])
                plain_times.append(times[False])
            resampled = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
            low, high = np.quantile(resampled, [0.025, 0.975])
            row = {
                "batch": batch,
                "steering": name,
                "pairs": pairs,
                "median_ratio": round(statistics.median(ratios), 4),
                "interval": [round(float(low), 4), round(float(high), 4)],
                "unsteered_ms_per_token": round(1000 * statistics.median(plain_times) / new_tokens, 2),
            }
            rows.append(row)
            click.echo(json.dumps(row))
    context = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    out.write_text(json.dumps({"context": context, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
