"""Measure how often the 95 % interval of the ECE holds the true one, on made-up answers whose true error is known.

    OMP_NUM_THREADS=1 python eval/interval_coverage.py --draws 1000      # writes interval_coverage.json

Each draw is so many questions with four choices. Their confidences are softmaxes of normal numbers, and being right is drawn
with a probability that is the confidence (calibrated) or another function of it. The true ECE is that of two million questions
without the noise of being right or wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from confsteer.evaluation.metrics import width_calibration_error
from confsteer.results.bootstrap import Blocks

TRUTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "calibrated": lambda c: c,
    "a little overconfident": lambda c: c - 0.03,
    "overconfident": lambda c: 0.25 + 0.6 * (c - 0.25),
    "at chance": lambda c: torch.full_like(c, 0.25),
    "over- and underconfident": lambda c: c + 0.08 * torch.sin(12 * c),
}
"""Chance of being right, from the confidence."""


def confidences(number: int, generator: torch.Generator) -> Tensor:
    """Draw confidences of answers, ``[number]``."""
    logits = 1.5 * torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1).amax(dim=1)


def true_error(truth: Callable[[Tensor], Tensor]) -> float:
    """Compute the ECE without the noise of being right or wrong."""
    confidence = confidences(2_000_000, torch.Generator().manual_seed(1))
    bins = (confidence * 15).long().clamp_max(14)
    return float(torch.bincount(bins, weights=confidence - truth(confidence)).abs().sum()) / len(confidence)


def coverage(truth: Callable[[Tensor], Tensor], questions: int, draws: int) -> dict[str, float]:
    """Draw sets of questions; how often the interval holds the true ECE, and how wide it is."""
    expected, held, below, width = true_error(truth), 0, 0, 0.0
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        confidence = confidences(questions, generator)
        right = torch.rand(questions, generator=generator, dtype=torch.float64) < truth(confidence)
        blocks = Blocks(torch.arange(questions), seed=draw)
        _, low, high = width_calibration_error(confidence, right, blocks)[0].interval
        held += low <= expected <= high
        below += high < expected
        width += (high - low) / draws
    return {"true": expected, "coverage": held / draws, "interval below": below / draws, "width": width}


def main() -> None:
    """Print a line for each kind of answers and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--questions", type=int, nargs="+", default=[200])
    given = parser.parse_args()
    draws, found = given.draws, {}
    for questions in given.questions:
        for name, truth in TRUTHS.items():
            found[f"{name}, {questions} questions"] = one = coverage(truth, questions, draws)
            print(f"{name}, {questions}: {', '.join(f'{key} {value:.3f}' for key, value in one.items())}", flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps({"draws": draws} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
