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
    """Log-likelihoods of a question's choices, in nats, float64 ``[choices]``; questions may differ in how many they have."""
    gold: Tensor
    """Index of the right choice, int64 ``[n]``."""
    left_out: int
    """Questions that do not have one right choice out of several, as far as their samples tell."""


class TaskCalibration(NamedTuple):
    """How well a model's confidence in its answers fits how often they are right."""

    task: str
    n: int
    left_out: int
    """See `Answers`."""
    metrics: dict[str, Interval]
    """See `confsteer.evaluation.metrics.answer_metrics`; empty where no question counts. Intervals are over questions."""


def read_answers(samples: Iterable[Mapping[str, Any]], config: Mapping[str, Any]) -> Answers:
    """Read the questions of a multiple-choice task that have one right choice, known from the sample.

    Left out are questions with several right choices, those whose choices are put into the question (such as Winogrande's:
    the sample does not say which is right), and all of a task that judges answers by a function of its own, since what its
    target means is known to that function alone (TruthfulQA's mc2 has several right choices and names the first).

    Args:
        samples: ``results["samples"][task]`` of `lm_eval.simple_evaluate`.
        config: ``results["configs"][task]``.
    """
    # Each filter of a task logs all questions again; what the model said is the same.
    questions = {sample["doc_id"]: sample for sample in samples}
    log_likelihoods, gold = [], []
    for sample in questions.values():
        values = torch.tensor([float(responses[0][0]) for responses in sample["resps"]], dtype=torch.float64)
        requests = sample["arguments"]
        if "acc_mutual_info" in sample["metrics"]:
            # After the choices given the question come the choices by themselves.
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
        # A chat template takes the place of the delimiter.
        target = next((choices.index(text) for text in (delimiter + target, target) if text in choices), None)
    return int(target) if isinstance(target, int) and 0 <= target < len(choices) else None


def calibration(task: str, answers: Answers) -> TaskCalibration:
    """Measure how well a choice's share of the probability of all choices says whether it is right."""
    n = len(answers.gold)
    if n == 0:
        return TaskCalibration(task, 0, answers.left_out, {})
    padded = pad_sequence(answers.log_likelihoods, batch_first=True, padding_value=-math.inf)
    found = answer_metrics(padded, answers.gold, Blocks(torch.arange(n)))
    return TaskCalibration(task, n, answers.left_out, {name: estimate.interval for name, estimate in found.items()})


def calibrations(results: Mapping[str, Any]) -> list[TaskCalibration]:
    """Make a row per multiple-choice task of what `lm_eval.simple_evaluate` returns, samples included."""
    return [
        calibration(task, read_answers(samples, results["configs"][task]))
        for task, samples in results["samples"].items()
        if results["configs"][task].get("output_type") == "multiple_choice"
    ]
