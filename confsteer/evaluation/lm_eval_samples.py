"""Calibration of answers to multiple-choice questions, from the samples that lm-eval logs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from confsteer.evaluation.metrics import answer_metrics
from confsteer.results.bootstrap import Blocks, Interval


class Answers(NamedTuple):
    """Log-likelihoods that a model gives the choices of each of n questions."""

    log_likelihoods: list[Tensor]
    """Log-likelihoods of each question's choices, in nats, float64 ``[choices]``. Questions may differ in their number."""
    gold: Tensor
    """Index of the right choice, int64 ``[n]``."""
    left_out: int
    """Number of questions whose samples do not show one right choice out of several."""


class TaskCalibration(NamedTuple):
    """Calibration of a model's confidence in its answers to a task."""

    task: str
    n: int
    left_out: int
    """See `Answers`."""
    metrics: dict[str, Interval]
    """Metrics; see `confsteer.evaluation.metrics.answer_metrics`. Empty if no question counts. Intervals are over questions."""


def read_answers(samples: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> Answers:
    """Read the questions of a multiple-choice task whose samples show one right choice.

    Questions with several right choices are left out. So are those whose choices are put into the question, such as
    Winogrande's, because the sample does not say which is right. A task may also judge answers by a function of its own. All its
    questions are left out, because only that function knows what its target means. (TruthfulQA's mc2 has several right choices
    and names the first.)

    Args:
        samples: ``results["samples"][task]`` of `lm_eval.simple_evaluate`.
        config: ``results["configs"][task]``.
    """
    # Skip repeats: each filter of a task logs all questions again, with the same answers of the model.
    questions = {sample["doc_id"]: sample for sample in samples}
    log_likelihoods, gold = [], []
    for sample in questions.values():
        values = torch.tensor([float(responses[0][0]) for responses in sample["resps"]], dtype=torch.float64)
        requests = sample["arguments"]
        if "acc_mutual_info" in sample["metrics"]:
            # Take the first half: after the choices given the question come the choices by themselves.
            values, requests = values[: len(values) // 2], requests[: len(requests) // 2]
        index = None if "process_results" in config else _gold(sample["target"], requests, config.get("target_delimiter", " "))
        if index is not None:
            log_likelihoods.append(values)
            gold.append(index)
    return Answers(log_likelihoods, torch.tensor(gold, dtype=torch.int64), len(questions) - len(gold))


def _gold(target: Any, requests: list[tuple[Any, ...]], delimiter: str) -> int | None:
    contexts, choices = {request[0] for request in requests}, [request[1] for request in requests]
    if len(contexts) > 1 or len(choices) < 2:
        return None
    if isinstance(target, str):
        # Allow for no delimiter: a chat template takes its place.
        target = next((choices.index(text) for text in (delimiter + target, target) if text in choices), None)
    return int(target) if isinstance(target, int) and 0 <= target < len(choices) else None


def calibration(task: str, answers: Answers) -> TaskCalibration:
    """Measure the calibration of a choice's share of the probability of all choices."""
    n = len(answers.gold)
    if n == 0:
        return TaskCalibration(task, 0, answers.left_out, {})
    padded = pad_sequence(answers.log_likelihoods, batch_first=True, padding_value=-math.inf)
    found = answer_metrics(padded, answers.gold, Blocks(torch.arange(n)))
    return TaskCalibration(task, n, answers.left_out, {name: estimate.interval for name, estimate in found.items()})


def calibrations(results: Mapping[str, Any]) -> list[TaskCalibration]:
    """Make a row per multiple-choice task from the results of `lm_eval.simple_evaluate`, which must have samples."""
    return [
        calibration(task, read_answers(samples, results["configs"][task]))
        for task, samples in results["samples"].items()
        if results["configs"][task].get("output_type") == "multiple_choice"
    ]
