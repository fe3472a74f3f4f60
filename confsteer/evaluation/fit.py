"""Interventions fitted to text by gradient: the baselines that steering is held against, and what `confsteer.tune` looks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from confsteer.evaluation.metrics import BINS, width_bins, width_calibration_error
from confsteer.last_layer.intervention import Intervention, TextStates
from confsteer.last_layer.scores import TokenScores
from confsteer.results.bootstrap import Blocks, Resampled

Objective = Literal["nll", "brier", "ece"]
Build = Callable[[Tensor], Intervention]
"""From parameters, ``[n]``, zero being neutral, to what they stand for."""
MAX_STEPS = 60
CONVERGED = 1e-5
"""Part of the objective below which a step's gain ends fitting."""
PATIENCE = 8
"""Steps without a better validation score after which fitting stops."""


class Fit(NamedTuple):
    """Where fitting ended."""

    parameters: Tensor
    intervention: Intervention
    steps: int
    """Steps of LBFGS taken to get there."""


def fit(
    build: Build,
    start: Tensor,
    train: Sequence[TextStates],
    *,
    objective: Objective = "nll",
    ridge: float = 0.0,
    validation: Sequence[TextStates] = (),
    on_step: Callable[[int, float], object] = lambda step, score: None,
) -> Fit:
    """Minimise an objective over texts that count equally, by LBFGS.

    Args:
        build: what parameters stand for.
        start: parameters to begin with, ``[n]``.
        train: texts.
        objective: ``nll``; ``brier`` of the top prediction; or ``ece``, for which the squared gaps of its bins are followed,
            which have a gradient.
        ridge: weight of the squared length of the parameters, as a part of the objective at the start; it pulls towards neutral.
        validation: texts by whose objective the best step is chosen; none: the last step.
        on_step: called after each step with its number and the best score so far.
    """
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=1, max_eval=20, history_size=20, line_search_fn="strong_wolfe")
    known: tuple[Tensor, Tensor, Tensor] | None = None
    # LBFGS measures its first step by the gradient: whatever the objective's units, that should be a step of length one.
    scale, pull = 1.0, 0.0

    def closure() -> Tensor:
        # LBFGS evaluates each step's starting point again, which is where the last step ended.
        nonlocal known, scale, pull
        here = parameters.detach()
        if known is None or not torch.equal(known[0], here):
            value, gradient = _value_and_gradient(build, here, train, objective)
            if known is None:
                pull = ridge * float(value)
            value, gradient = value + pull * here.square().sum(), gradient + 2 * pull * here
            if known is None:
                scale = 1 / max(float(gradient.norm()), 1e-12)
            known = (here.clone(), scale * value, scale * gradient)
        parameters.grad = known[2].clone()
        return known[1]

    def score(at: Tensor) -> float:
        scored = [text.scores(build(at)) for text in validation]
        return sum(_objective_value(objective, scores) for scores in scored) / max(1, len(scored))

    # Step until the objective stands still or validation no longer gets better; keep the best step.
    best, best_score, best_step = start.clone(), score(start), 0
    before = float(closure())
    for step in range(1, MAX_STEPS + 1):
        optimizer.step(closure)
        here = parameters.detach().clone()
        if not validation or (reached := score(here)) < best_score:
            best, best_step = here, step
            best_score = reached if validation else best_score
        on_step(step, best_score)
        value = float(closure())
        if before - value < CONVERGED * abs(value) or step - best_step >= PATIENCE:
            break
        before = value
    return Fit(best, build(best), best_step)


def _objective_value(objective: Objective, scores: TokenScores) -> float:
    everything = Blocks(torch.zeros(len(scores.nll), dtype=torch.long))
    return objective_estimate(objective, scores, everything).value


def objective_estimate(objective: Objective, scores: TokenScores, blocks: Blocks) -> Resampled:
    """Estimate an objective as the reports have it."""
    if objective == "nll":
        return blocks.mean(scores.nll)
    if objective == "brier":
        return blocks.mean((scores.confidence - scores.correct.float()).square())
    return width_calibration_error(scores.confidence, scores.correct, blocks)[0]


def _value_and_gradient(build: Build, at: Tensor, texts: Sequence[TextStates], objective: Objective) -> tuple[Tensor, Tensor]:
    parameters = at.clone().requires_grad_()
    value, gradient = torch.zeros(()), torch.zeros_like(at)
    for text in texts:
        per_token = _token_loss(objective, build, at, text)
        for chunk in text.chunks():
            with torch.enable_grad():
                part = per_token(chunk.logits(build(parameters)), chunk.states.targets).sum() / (text.tokens * len(texts))
                (slope,) = torch.autograd.grad(part, parameters)
            value, gradient = value + part.detach().cpu(), gradient + slope
    return value, gradient


def _token_loss(objective: Objective, build: Build, at: Tensor, text: TextStates) -> Callable[[Tensor, Tensor], Tensor]:
    """Choose the loss of each token, from logits ``[tokens, vocab]`` and targets ``[tokens]``."""
    if objective == "nll":
        return lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    def gap(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        top, prediction = logits.max(dim=-1)
        confidence = (top - logits.logsumexp(dim=-1)).exp()
        return confidence, confidence - (prediction == targets).float()

    if objective == "brier":
        return lambda logits, targets: gap(logits, targets)[1].square()
    # Σ_b (n_b/n) gap_b² has in each token the slope of 2 gap_b · confidence, and Σ_b n_b/n · gap_b · (confidence − correct)
    # is its value.
    scores = text.scores(build(at))
    bins = width_bins(scores.confidence)
    numbers = torch.bincount(bins, minlength=BINS)
    gaps = torch.bincount(bins, weights=scores.confidence.double() - scores.correct.double(), minlength=BINS)
    mean_gap = (gaps / numbers.clamp_min(1)).float()

    def squared_gap(logits: Tensor, targets: Tensor) -> Tensor:
        confidence, difference = gap(logits, targets)
        its_gap = mean_gap.to(logits.device)[width_bins(confidence.detach().clamp_max(1))]
        return its_gap * (2 * difference - difference.detach())

    return squared_gap


def temperature(parameters: Tensor) -> Tensor:
    """Turn a parameter into a temperature: it is the logarithm, so that zero is neutral. It stays between 1/100 and 100."""
    return parameters.clamp(-4.6, 4.6).exp()


def fit_temperature(train: Sequence[TextStates]) -> Intervention:
    """Scale by temperature (Guo et al. 2017): the one number that minimises the loss."""
    neutral = _neutral(train)
    return fit(lambda p: neutral._replace(temperature=temperature(p[0])), torch.zeros(1), train).intervention


def fit_null_write(train: Sequence[TextStates]) -> Intervention:
    """Make an entropy neuron by hand: a constant along the direction the unembedding reads least.

    Without neurons of the model's own it is what can be done through the norm alone. It lengthens the residual, which is
    another way to a temperature, and shortens it only where the residual has a part to cancel; so both signs are tried.
    """
    neutral = _neutral(train)
    unit = sum(_mean_length(text) for text in train) / len(train)

    def build(parameters: Tensor) -> Intervention:
        return neutral._replace(null_write=unit * parameters[0])

    fits = [fit(build, torch.tensor([start]), train) for start in (-0.3, 0.3)]
    losses = [float(_value_and_gradient(build, one.parameters, train, "nll")[0]) for one in fits]
    return fits[losses.index(min(losses))].intervention


def _mean_length(text: TextStates) -> float:
    """Average the length of the residual over tokens."""
    return sum(float(text.readout.centre(one.states.residual).norm(dim=-1).sum()) for one in text.chunks()) / text.tokens


@torch.no_grad()
def match_entropy(text: TextStates, entropies: Sequence[float]) -> list[Intervention]:
    """Find the temperatures at which the unsteered model has these mean entropies on this text.

    Newton's method on all of them at once: with ``β = 1/T`` the slope of the mean entropy is ``−β E[Var_p z]``.

    Args:
        text: what the mean is over.
        entropies: nats, between 0 and the logarithm of the vocabulary.
    """
    wanted = torch.tensor(entropies, dtype=torch.float64)
    neutral = _neutral([text])
    log_beta = torch.zeros(len(entropies), dtype=torch.float64)
    for _ in range(20):
        entropy, variance = torch.zeros(2, len(entropies), dtype=torch.float64)
        for chunk in text.chunks():
            logits = chunk.logits(neutral)
            for i, beta in enumerate(log_beta.exp().tolist()):
                log_p = (beta * logits).log_softmax(dim=-1)
                p = log_p.exp()
                mean = (p * log_p).sum(dim=-1)
                entropy[i] -= mean.double().sum().cpu()
                # Var_p(log p) = β² Var_p(z)
                variance[i] += ((p * log_p.square()).sum(dim=-1) - mean.square()).double().sum().cpu()
        error = entropy / text.tokens - wanted
        if (error.abs() < 1e-5).all():
            break
        # dH/dlog β = −Var_p(log p); steps are kept short where the entropy hardly moves.
        log_beta += (error * text.tokens / variance.clamp_min(1e-9)).clamp(-0.5, 0.5)
    return [neutral._replace(temperature=torch.tensor(1 / beta)) for beta in log_beta.exp().tolist()]


def _neutral(texts: Sequence[TextStates]) -> Intervention:
    return Intervention.neutral(texts[0].readout.n_neurons)
