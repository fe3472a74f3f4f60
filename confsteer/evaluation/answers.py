"""Ways to answer multiple-choice questions that steerings are compared with, fitted on one half and used on the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from confsteer.evaluation.choice_sample import ChoiceSample
from confsteer.evaluation.comparison import RowKind
from confsteer.steering import Steering

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 1e4
"""Range of temperatures in fits. Answers no better than chance are best at the highest, where all choices are alike."""
HALVINGS = 60
"""Bisection steps over the range of log-temperatures: enough for every binary digit."""
LOGIT_RIDGE = 1e-4
"""Pull of a conditional logit's weights to zero, for features of variance one. It decides where the questions do not."""
NEWTON_STEPS = 50
NEWTON_TOLERANCE = 1e-7


class AnswerCandidate(NamedTuple):
    """A way to answer."""

    name: str
    kind: RowKind
    log_likelihood: Tensor
    """Scores whose softmax is the confidence in each choice, in the form of `ChoiceSample.log_likelihoods`."""
    steering: Steering | None = None
    values: tuple[float, ...] = ()
    """Fitted numbers of each fold; see `confsteer.evaluation.comparison.ComparedRow`."""


def baselines(sample: ChoiceSample, log_likelihood: Tensor) -> list[AnswerCandidate]:
    """Make the ways to answer without steering.

    - the unsteered model;
    - chance: all choices alike;
    - a temperature on the log-likelihoods of whole choices;
    - if choices differ in length: a temperature, and a weight for each token and each character of a choice;
    - log-likelihoods per character and per token, each over a temperature of its own.

    Args:
        sample: the questions.
        log_likelihood: log-likelihoods of the unsteered model, from `ChoiceSample.log_likelihoods`.
    """
    alike = torch.zeros_like(log_likelihood).masked_fill(~sample.inside, -math.inf)
    found = [
        AnswerCandidate("neutral", "neutral", log_likelihood, Steering()),
        AnswerCandidate("chance", "chance", alike),
        over_temperature(sample, log_likelihood, "fitted temperature", "temperature"),
    ]
    if not any(_differ(lengths, sample.inside) for lengths in (sample.characters, sample.tokens)):
        return found
    found.append(_with_length(sample, log_likelihood))
    for unit, lengths in (("character", sample.characters), ("token", sample.tokens)):
        if _differ(lengths, sample.inside):
            found.append(over_temperature(sample, log_likelihood / lengths, f"per {unit}", "scoring"))
    return found


def over_temperature(sample: ChoiceSample, score: Tensor, name: str, kind: RowKind) -> AnswerCandidate:
    """Divide scores by a temperature fitted on the other half of the questions; see `ChoiceSample.cross_fitted`."""
    gold = sample.gold

    def fit(seen: Tensor) -> Tensor:
        return torch.tensor([fit_answer_temperature(score[seen], gold[seen])], dtype=torch.float64)

    used, values = sample.cross_fitted(fit, lambda fitted, use: score[use] / fitted)
    return AnswerCandidate(name, kind, used, values=tuple(values.flatten().tolist()))


def _with_length(sample: ChoiceSample, log_likelihood: Tensor) -> AnswerCandidate:
    inside, gold = sample.inside, sample.gold
    features = torch.stack([log_likelihood.masked_fill(~inside, 0), sample.tokens, sample.characters], dim=-1)

    def fit(seen: Tensor) -> Tensor:
        return fit_logit(features[seen], inside[seen], gold[seen])

    def use(weights: Tensor, those: Tensor) -> Tensor:
        return (features[those] @ weights).masked_fill(~inside[those], -math.inf)

    scores, weights = sample.cross_fitted(fit, use)
    values = [(min(1 / max(first, 1 / MAX_TEMPERATURE), MAX_TEMPERATURE), *rest) for first, *rest in weights.tolist()]
    return AnswerCandidate(
        "temperature and length", "temperature and length", scores, values=tuple(number for fold in values for number in fold)
    )


def _differ(lengths: Tensor, inside: Tensor) -> bool:
    """Whether any question has choices of different lengths."""
    return bool(((lengths != lengths[:, :1]) & inside).any())


def fit_answer_temperature(log_likelihood: Tensor, gold: Tensor) -> float:
    """Find the temperature on answers that minimises their loss, between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`.

    The loss is convex in ``1/T`` and its slope is ``E_p[ℓ] − ℓ_gold``. So at the minimum the right choices are as likely as the
    model expects.

    Args:
        log_likelihood: of the choices, ``[questions, choices]``; −∞ where a question has fewer.
        gold: index of the right choice, ``[questions]``.
    """
    of_gold = log_likelihood.gather(1, gold[:, None])[:, 0]

    def surplus(temperature: float) -> float:
        share = (log_likelihood / temperature).softmax(dim=-1)
        expected = (share * log_likelihood.nan_to_num(neginf=0.0)).sum(dim=-1)
        return float((of_gold - expected).mean())

    return _crossing(surplus)


def match_answer_entropy(log_likelihood: Tensor, entropy: float) -> float:
    """Find the temperature, between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`, at which answers have a given mean entropy.

    Args:
        log_likelihood: of the choices, ``[questions, choices]``; −∞ where a question has fewer.
        entropy: the mean entropy, in nats, between 0 and the mean logarithm of the numbers of choices.
    """
    return _crossing(lambda temperature: answer_entropy(log_likelihood / temperature) - entropy)


def _crossing(rising: Callable[[float], float]) -> float:
    """Find the temperature at which a rising function of it crosses zero. If it does not, return an end of the range."""
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(math.exp(middle)) > 0 else (middle, high)
    return math.exp(middle)


def answer_entropy(log_likelihood: Tensor) -> float:
    """Average the entropy of answers, nats."""
    return float(torch.special.entr(log_likelihood.softmax(dim=-1)).sum(dim=-1).mean())


def fit_logit(features: Tensor, inside: Tensor, gold: Tensor) -> Tensor:
    """Fit a conditional logit (McFadden 1974) by Newton's method: weights of features that minimise the loss of answers.

    The loss is convex. The first feature is the log-likelihood. A negative weight of it is set to zero.

    Args:
        features: of each choice, float64 ``[questions, choices, features]``.
        inside: marks the choices that a question has, ``[questions, choices]``.
        gold: index of the right choice, ``[questions]``.

    Returns:
        Weights, ``[features]``.
    """
    weights = _logit(features, inside, gold)
    if weights[0] < 0:
        weights = torch.cat([torch.zeros_like(weights[:1]), _logit(features[..., 1:], inside, gold)])
    return weights


def _logit(features: Tensor, inside: Tensor, gold: Tensor) -> Tensor:
    # Scale features by their differences within a question, because only these count.
    number = inside.sum(dim=1, keepdim=True)
    mean = (features * inside[..., None]).sum(dim=1) / number
    centred = (features - mean[:, None]) * inside[..., None]
    scale = (centred.square().sum(dim=(0, 1)) / inside.sum()).sqrt().clamp_min(1e-12)
    x = centred / scale
    of_gold = x[torch.arange(len(gold)), gold]
    pull = LOGIT_RIDGE * torch.eye(x.shape[-1], dtype=x.dtype)

    def loss(weights: Tensor) -> Tensor:
        score = (x @ weights).masked_fill(~inside, -math.inf)
        return (score.logsumexp(dim=1) - of_gold @ weights).mean() + weights @ pull @ weights / 2

    weights = torch.zeros(x.shape[-1], dtype=x.dtype)
    for _ in range(NEWTON_STEPS):
        share = (x @ weights).masked_fill(~inside, -math.inf).softmax(dim=1)
        expected = (share[..., None] * x).sum(dim=1)
        slope = (expected - of_gold).mean(dim=0) + pull @ weights
        curvature = torch.einsum("qc,qcf,qcg->fg", share, x, x) / len(x) - expected.T @ expected / len(x) + pull
        step = torch.linalg.solve(curvature, slope)
        if float(step.abs().max()) < NEWTON_TOLERANCE:
            break
        # Halve steps that go too far, as whole steps may far from the minimum.
        size, here = 1.0, loss(weights)
        while loss(weights - size * step) > here and size > NEWTON_TOLERANCE:
            size /= 2
        weights = weights - size * step
    return weights / scale


def halves_disagree(values: Sequence[float]) -> bool:
    """Whether the temperatures of the two halves are more than a factor of 1.5 apart."""
    return len(values) == 2 and max(values) > 1.5 * min(values)
