"""Confidences in an answer that a model wrote, and the maps fitted to them.

| confidence | is |
|---|---|
| sequence probability | product of the probabilities of the answer's tokens, that which ends it among them |
| per token | geometric mean of these |
| self-consistency | share of samples at temperature 1 that give the same answer (Wang et al. 2022) |
| P(True) | asked about its answer, the probability of "A", true, beside "B", false (Kadavath et al. 2022) |
| verbalised | percentage that the model writes when it is asked for one (Tian et al. 2023) |

A steering changes all of them, and may change the answer too. Probabilities and samples are of the steered model's own
distribution, at temperature 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from confsteer.evaluation.answers import fit_logit

ConfidenceName = Literal["sequence", "per_token", "self_consistency", "p_true", "verbalised"]
PromptName = Literal["answer", "p_true", "verbalised"]
"""Kinds of prompts: the question, and two about its answer."""
CONFIDENCES: dict[ConfidenceName, str] = {
    "sequence": "sequence probability",
    "per_token": "per token",
    "self_consistency": "self-consistency",
    "p_true": "P(True)",
    "verbalised": "verbalised",
}
"""Label of each confidence, in the order of all tables."""
OF_TOKENS: tuple[ConfidenceName, ...] = ("sequence", "per_token")
"""Confidences that a temperature on the tokens' logits changes."""
TEMPERATURES = tuple(10 ** (k / 10) for k in range(-10, 16))
"""Temperatures to try on tokens, 0.1 to 32, in steps of 26 %. 1 is among them."""
UNSTEERED = TEMPERATURES.index(1.0)
MOST_CERTAIN = 0.99
"""Bound of confidences before their logit is taken, from 0 and from 1: shares of a few samples may be 0 or 1."""
_ABOUT = "{% if passage %}{{ passage }}\n{% endif %}Question: {{ question }}\nProposed Answer: {{ proposed }}\n"
P_TRUE = _ABOUT + "Is the proposed answer:\n (A) True\n (B) False\nThe proposed answer is:"
"""Kadavath et al.'s question (2022, section 3.1), without samples of other answers. The model replies "A" or "B"."""
VERBALISED = (
    _ABOUT
    + "How likely is it that the proposed answer is right? Give only the probability, a percentage from 0% to 100%, and no "
    "other words.\nProbability:"
)
"""A question after Tian et al. (2023, "Verb. 2S"): it asks for the probability of an answer that is given."""


class Fitted(NamedTuple):
    """Confidences after a map. It was fitted on one half of the questions and used on the other, and the other way round."""

    confidence: Tensor
    """``[questions]``, NaN where there is none."""
    values: tuple[float, ...]
    """Fitted numbers of each half: a temperature, or the slope and the constant of `platt`."""


def of_tokens(log_probability: Sequence[Tensor]) -> dict[ConfidenceName, Tensor]:
    """Compute the confidences that follow from tokens, float64 ``[temperatures, answers]`` each.

    Args:
        log_probability: log-probabilities of each answer's tokens, ``[temperatures, tokens]``.
    """
    totals = torch.stack([one.double().sum(dim=-1) for one in log_probability], dim=-1)
    lengths = torch.tensor([one.shape[-1] for one in log_probability], dtype=torch.float64)
    return {"sequence": totals.exp(), "per_token": (totals / lengths).exp()}


def percentage(text: str) -> float:
    """Read a probability from a reply: its first number, in percent. With a decimal point and no ``%``, up to 1, it is a share.

    Returns:
        A number between 0 and 1; NaN if there is none.
    """
    found = re.search(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|percent)?", text)
    if found is None:
        return float("nan")
    number = float(found[1])
    share = number if "." in found[1] and not found[2] and number <= 1 else number / 100
    return share if share <= 1 else float("nan")


def best_temperature(confidence: Tensor, correct: Tensor, block: Tensor) -> Fitted:
    """Pick the temperature on tokens with the least loss of confidences: ``−log`` of the confidence in what happened.

    Args:
        confidence: confidences at each of `TEMPERATURES`, ``[temperatures, questions]``.
        correct: ``[questions]`` bool.
        block: of each question, ``[questions]``.
    """

    def fit(seen: Tensor) -> Tensor:
        likely = torch.where(correct[seen], confidence[:, seen], 1 - confidence[:, seen])
        return likely.clamp_min(1e-12).log().mean(dim=1).argmax()[None]

    found, chosen = _cross_fitted(block, fit, lambda index, used: confidence[int(index), used])
    return Fitted(found, tuple(TEMPERATURES[int(i)] for i in chosen.flatten()))


def platt(confidence: Tensor, correct: Tensor, block: Tensor) -> Fitted:
    """Map confidences by ``σ(a · logit + b)`` with ``a ≥ 0`` (Platt 1999), fitted by likelihood.

    Args:
        confidence: ``[questions]``. NaN where there is none; such questions are left out.
        correct: ``[questions]`` bool.
        block: of each question, ``[questions]``.
    """
    logit = confidence.double().clamp(1 - MOST_CERTAIN, MOST_CERTAIN).logit()
    features = torch.stack([logit, torch.ones_like(logit)], dim=-1)
    known = confidence.isfinite()

    def fit(seen: Tensor) -> Tensor:
        rows = seen & known
        if not rows.any():
            return torch.tensor([1.0, 0.0], dtype=torch.float64)
        # Treat right and wrong as two choices, of which the second has no features.
        choices = torch.stack([features[rows], torch.zeros_like(features[rows])], dim=1)
        return fit_logit(choices, torch.ones(choices.shape[:2], dtype=torch.bool), (~correct[rows]).long())

    found, weights = _cross_fitted(block, fit, lambda weights, used: (features[used] @ weights).sigmoid())
    return Fitted(found, tuple(weights.flatten().tolist()))


def _cross_fitted(
    block: Tensor, fit: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Fit on every other block and use the fit on the rest, and the other way round, as `ChoiceSample.cross_fitted` does.

    Returns:
        Confidences ``[questions]``, and the numbers of each half, ``[2, numbers]``.
    """
    _, order = block.unique(return_inverse=True)
    confidence = torch.zeros(len(block), dtype=torch.float64)
    fitted = []
    for side in (0, 1):
        used = order % 2 == side
        fitted.append(fit(~used))
        confidence[used] = use(fitted[-1], used)
    return confidence, torch.stack(fitted)
