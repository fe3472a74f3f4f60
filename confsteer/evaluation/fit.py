"""Interventions fitted to text: the baselines that steering is compared with, and the search of `confsteer.tune`.

Fits use a sample of the vocabulary (`confsteer.last_layer.sample`), without another pass over the whole. The effect of a fitted
intervention is computed elsewhere, over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from confsteer.evaluation.metrics import BINS, width_bins, width_calibration_error
from confsteer.last_layer.cores import on_all_cores
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.sample import SampledLogits
from confsteer.last_layer.scores import TokenScores
from confsteer.last_layer.text_states import TextStates
from confsteer.results.bootstrap import Blocks, Resampled

Objective = Literal["nll", "brier", "ece"]
Build = Callable[[Tensor], Intervention]
"""Function from parameters, ``[n]``, to an intervention. Zero is neutral."""
MAX_STEPS = 60
CONVERGED = 1e-5
"""Share of the objective. A step that gains less ends the fit."""
PATIENCE = 8
"""Steps without a better validation score after which the fit ends."""
LOG_RANGE = 4.6
"""Bound of the logarithm of temperatures, which are between 1/100 and 100."""
LOG_TOLERANCE = 1e-6
"""Step of a temperature's logarithm below which its search ends."""
FIRST_STEP, FARTHEST, NARROW, FLAT = 0.1, 30.0, 1e-5, 1e-6
"""Search for a constant, in lengths of the mean residual: first step, end, and the width or slope that is narrow or flat."""


class Fit(NamedTuple):
    """End of a fit."""

    parameters: Tensor
    intervention: Intervention
    steps: int
    """Steps of LBFGS that it took."""


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
        build: function from parameters to an intervention.
        start: first parameters, ``[n]``.
        train: texts to fit.
        objective: ``nll``, ``brier`` of the top prediction, or ``ece``. For ECE the squared gaps of its bins are minimised,
            because they have a gradient.
        ridge: weight of the squared length of the parameters, as a share of the objective at the start. It pulls towards
            neutral.
        validation: texts whose objective chooses the best step. Without any, the last step is taken.
        on_step: function called after each step with its number and the best score so far.
    """

    def value_and_gradient(at: Tensor) -> tuple[Tensor, Tensor]:
        return _value_and_gradient(build, at, train, objective)

    def score(at: Tensor) -> float:
        scored = [text.sampled_scores(build(at)) for text in validation]
        return sum(_objective_value(objective, scores) for scores in scored) / len(scored)

    best, steps = minimise(value_and_gradient, start, score=score if validation else None, ridge=ridge, on_step=on_step)
    return Fit(best, build(best), steps)


def minimise(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    score: Callable[[Tensor], float] | None = None,
    ridge: float = 0.0,
    on_step: Callable[[int, float], object] = lambda step, score: None,
) -> tuple[Tensor, int]:
    """Minimise a function by LBFGS.

    Args:
        value_and_gradient: value and gradient of the function at parameters, ``[n]``.
        start: see `fit`.
        score: score of parameters. The best step is kept, and the search ends when it no longer improves. None: the last step.
        ridge: see `fit`.
        on_step: see `fit`.

    Returns:
        The parameters, and the steps taken to get there.
    """
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=1, max_eval=20, history_size=20, line_search_fn="strong_wolfe")
    known: tuple[Tensor, Tensor, Tensor] | None = None
    # Scale the objective: LBFGS measures its first step by the gradient, and it should have length one in any units.
    scale, pull = 1.0, 0.0

    def closure() -> Tensor:
        # Reuse the last value: LBFGS evaluates each step's starting point again, which is the end of the last step.
        nonlocal known, scale, pull
        here = parameters.detach()
        if known is None or not torch.equal(known[0], here):
            value, gradient = value_and_gradient(here)
            if known is None:
                pull = ridge * float(value)
            value, gradient = value + pull * here.square().sum(), gradient + 2 * pull * here
            if known is None:
                scale = 1 / max(float(gradient.norm()), 1e-12)
            known = (here.clone(), scale * value, scale * gradient)
        parameters.grad = known[2].clone()
        return known[1]

    # Step until the objective or the score no longer improves. Keep the best step.
    best, best_score, best_step = start.clone(), score(start) if score else 0.0, 0
    before = float(closure())
    for step in range(1, MAX_STEPS + 1):
        optimizer.step(closure)
        here = parameters.detach().clone()
        reached = score(here) if score else -math.inf
        if reached < best_score:
            best, best_step = here, step
            best_score = reached if score else best_score
        on_step(step, best_score)
        value = float(closure())
        if before - value < CONVERGED * abs(value) or step - best_step >= PATIENCE:
            break
        before = value
    return best, best_step


def _objective_value(objective: Objective, scores: TokenScores) -> float:
    everything = Blocks(torch.zeros(len(scores.nll), dtype=torch.long))
    return objective_estimate(objective, scores, everything).value


def objective_estimate(objective: Objective, scores: TokenScores, blocks: Blocks) -> Resampled:
    """Estimate an objective as in the reports."""
    if objective == "nll":
        return blocks.mean(scores.nll)
    if objective == "brier":
        return blocks.mean((scores.confidence - scores.correct.float()).square())
    return width_calibration_error(scores.confidence, scores.correct, blocks)[0]


def _value_and_gradient(build: Build, at: Tensor, texts: Sequence[TextStates], objective: Objective) -> tuple[Tensor, Tensor]:
    value, gradient = torch.zeros(()), torch.zeros_like(at)
    for text in texts:
        found, slope = sum_and_gradient(build, at, text, _token_loss(objective, build, at, text))
        share = 1 / (text.tokens * len(texts))
        value, gradient = value + share * found, gradient + share * slope
    return value, gradient


def sum_and_gradient(
    build: Build, at: Tensor, text: TextStates, per_token: Callable[[SampledLogits, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """Add up a loss over the tokens of a text, on its sample of the vocabulary, and take its gradient by the parameters.

    Args:
        build: see `fit`.
        at: parameters, ``[n]``.
        text: to read.
        per_token: function from logits of a few tokens, and the slice of these tokens, to the loss of each.
    """
    parameters = at.clone().requires_grad_()
    with torch.enable_grad():
        coordinates = text.coordinates(build(parameters))
    moved = {name: field for name, field in coordinates._asdict().items() if field is not None and field.requires_grad}
    slopes = {name: torch.empty_like(field) for name, field in moved.items()}
    blocks = text.sampled_blocks()
    values = torch.zeros(len(blocks))

    # Cut the graph where it is narrowest: a few coordinates stand for all of a token's logits.
    def differentiate(number: int) -> None:
        rows = blocks[number]
        with torch.enable_grad():
            leaves = {name: field[rows].detach().requires_grad_() for name, field in moved.items()}
            loss = per_token(text.sampled_at(rows, coordinates.at(rows)._replace(**leaves)), rows).sum()
            for name, slope in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                slopes[name][rows] = slope
        values[number] = loss.detach()

    on_all_cores(differentiate, range(len(blocks)), coordinates.cooling.device)
    (slope,) = torch.autograd.grad(list(moved.values()), parameters, list(slopes.values()))
    return values.sum(), slope


def _token_loss(objective: Objective, build: Build, at: Tensor, text: TextStates) -> Callable[[SampledLogits, slice], Tensor]:
    """Choose the loss of each token, from its logits."""
    if objective == "nll":
        return lambda part, rows: part.log_sum - part.of_target

    def gap(part: SampledLogits) -> tuple[Tensor, Tensor]:
        top, prediction = part.likeliest()
        confidence = (top - part.log_sum).exp()
        correct = prediction == part.ids[:, -1]
        return confidence, confidence - correct.float()

    if objective == "brier":
        return lambda part, rows: gap(part)[1].square()
    # Give each token the slope of 2 gap_b · confidence and the value gap_b · (confidence − correct): they add up to those of
    # Σ_b (n_b/n) gap_b².
    scores = text.sampled_scores(build(at))
    bins = width_bins(scores.confidence)
    numbers = torch.bincount(bins, minlength=BINS)
    gaps = torch.bincount(bins, weights=scores.confidence.double() - scores.correct.double(), minlength=BINS)
    mean_gap = (gaps / numbers.clamp_min(1)).float()

    def squared_gap(part: SampledLogits, rows: slice) -> Tensor:
        confidence, difference = gap(part)
        its_gap = mean_gap.to(confidence.device)[width_bins(confidence.detach().clamp_max(1))]
        return its_gap * (2 * difference - difference.detach())

    return squared_gap


def temperature(parameters: Tensor) -> Tensor:
    """Turn a parameter, the logarithm, into a temperature between 1/100 and 100. Zero is neutral."""
    return parameters.clamp(-LOG_RANGE, LOG_RANGE).exp()


class _Moments(NamedTuple):
    """Means over a text at an inverse temperature ``β``, where ``p ∝ exp(β z)``."""

    log_sum: float
    """``log Σ exp(β z)``"""
    mean: float
    """``E_p[z]``"""
    variance: float
    """``Var_p[z]``"""
    of_target: float
    """``z`` of the token that came."""

    @classmethod
    def of(cls, unsteered: Sequence[SampledLogits], beta: float) -> _Moments:
        """Average over the tokens of a text, given in parts."""
        sums = torch.zeros(4, dtype=torch.float64)
        for part in unsteered:
            y = beta * part.logits + part.log_weight
            p = y.softmax(dim=-1)
            mean = torch.linalg.vecdot(p, part.logits)
            variance = torch.linalg.vecdot(p, (part.logits - mean[:, None]).square_())
            sums += torch.stack([y.logsumexp(dim=-1), mean, variance, part.of_target]).double().sum(dim=1).cpu()
        return cls(*(sums / sum(len(part.ids) for part in unsteered)).tolist())


def _crossing(falling: Callable[[float], tuple[float, float]]) -> float:
    """Find the temperature at which a falling function of ``log β`` crosses zero. If it does not, return an end of the range.

    It is Newton's method, with bisection where a step would leave the interval that holds the crossing.

    Args:
        falling: the function, which returns its value and its slope.
    """
    low, high, at = -LOG_RANGE, LOG_RANGE, 0.0
    for _ in range(MAX_STEPS):
        value, slope = falling(math.exp(at))
        low, high = (at, high) if value > 0 else (low, at)
        step = -value / slope if slope < 0 else math.inf
        if abs(step) < LOG_TOLERANCE or high - low < LOG_TOLERANCE:
            break
        # Keep steps short where the curve bends.
        after = at + min(max(step, -1.0), 1.0)
        at = after if low < after < high else (low + high) / 2
    return math.exp(-at)


@torch.no_grad()
def fit_temperature(train: Sequence[TextStates]) -> Intervention:
    """Fit a temperature (Guo et al. 2017): the one number that minimises the loss over texts, which count equally.

    With ``β = 1/T`` the loss is convex: its slope is ``E_p[z] − z_target`` and its curvature ``Var_p[z]``.
    """
    neutral = _neutral(train)
    unsteered = [list(text.sampled(text.coordinates(neutral))) for text in train]

    def downhill(beta: float) -> tuple[float, float]:
        moments = [_Moments.of(parts, beta) for parts in unsteered]
        slopes = [one.of_target - one.mean for one in moments]
        return sum(slopes) / len(slopes), -beta * sum(one.variance for one in moments) / len(moments)

    return neutral._replace(temperature=torch.tensor(_crossing(downhill)))


def fit_null_write(train: Sequence[TextStates]) -> Intervention:
    """Make an entropy neuron by hand: a constant along the direction that the unembedding reads least.

    It is what can be done through the norm alone, without the model's own neurons. It lengthens the residual, which acts like a
    temperature. It shortens the residual only if there is a component to cancel. So both signs are tried.
    """
    neutral = _neutral(train)
    unit = sum(float(text.geometry.own[:, -1, -1].sqrt().mean()) for text in train) / len(train)

    def build(parameters: Tensor) -> Intervention:
        return neutral._replace(null_write=unit * parameters[0])

    found = [_descend(lambda at: _value_and_gradient(build, torch.tensor([at]), train, "nll"), start) for start in (-0.3, 0.3)]
    return build(torch.tensor([min(found)[1]]))


def _descend(function: Callable[[float], tuple[Tensor, Tensor]], start: float) -> tuple[float, float]:
    """Go downhill from `start` to where the slope changes sign. Return the value there, and the place.

    Steps are doubled until the slope has changed. Then the crossing is found by the Illinois method (Dowell and Jarratt 1971).

    Args:
        function: the function, which returns its value and its slope.
        start: where to begin.
    """

    def evaluate(at: float) -> tuple[float, float, float]:
        value, slope = (float(one) for one in function(at))
        return value, at, slope

    here = evaluate(start)
    best, step = here, -math.copysign(FIRST_STEP, here[2])
    # Walk until the slope points back.
    while True:
        there = evaluate(here[1] + step)
        best = min(best, there)
        if there[2] * here[2] <= 0 or abs(there[1]) > FARTHEST:
            break
        here, step = there, 2 * step
    # Close in from both sides. Count a side that stays half.
    (_, a, slope_a), (_, b, slope_b) = here, there
    for _ in range(MAX_STEPS):
        if slope_a * slope_b >= 0 or abs(b - a) < NARROW:
            break
        value, c, slope = evaluate((a * slope_b - b * slope_a) / (slope_b - slope_a))
        best = min(best, (value, c, slope))
        if abs(slope) < FLAT:
            break
        if slope * slope_b < 0:
            a, slope_a = b, slope_b
        else:
            slope_a /= 2
        b, slope_b = c, slope
    return best[0], best[1]


@torch.no_grad()
def match_entropy(text: TextStates, entropies: Sequence[float]) -> list[Intervention]:
    """Find the temperatures at which the unsteered model has these mean entropies on this text.

    With ``β = 1/T`` the slope of the mean entropy against ``log β`` is ``−β² E[Var_p z]``.

    Args:
        text: the text that the mean is over.
        entropies: nats, between 0 and the logarithm of the vocabulary.
    """
    neutral = _neutral([text])
    unsteered = list(text.sampled(text.coordinates(neutral)))

    def match(entropy: float) -> Intervention:
        def excess(beta: float) -> tuple[float, float]:
            moments = _Moments.of(unsteered, beta)
            return moments.log_sum - beta * moments.mean - entropy, -(beta**2) * moments.variance

        return neutral._replace(temperature=torch.tensor(_crossing(excess)))

    return [match(entropy) for entropy in entropies]


def _neutral(texts: Sequence[TextStates]) -> Intervention:
    return Intervention.neutral(texts[0].readout.n_neurons)
