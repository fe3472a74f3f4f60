"""Calibration, loss and entropy of next tokens and of answers, with bootstrap intervals over blocks.

Calibration metrics compare a confidence with being right. For a next token the confidence is the top probability, and it is
right if that token came. For an answer the confidence is the top choice's share. The metrics are the same for both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from confsteer.last_layer.scores import TokenScores
from confsteer.results.bootstrap import Blocks, Resampled, resampled_norm

BINS = 15
MASS_BINS = 10
SELECTED = 0.1
RANK_BINS = 500
"""Bins of confidence in the resamples of AUROC and the selective metrics, which depend on the order of confidences."""
SMOOTH_RESAMPLES = 100
"""Number of resamples for the interval of smooth ECE, which is slow."""

UNIT = (0.0, 1.0)
Estimates = dict[str, Resampled]


class Metric(NamedTuple):
    """A metric: its definition, its format, and which way is better."""

    label: str
    definition: str
    better: Literal["lower", "higher"] | None = None
    """Better direction. None if neither is good or bad in itself."""
    compared: bool = False
    """Whether paired differences to the baselines are reported."""
    digits: int = 4
    percent: bool = False
    short: str = ""
    """Heading in a narrow table. If empty, it is the label."""

    @property
    def heading(self) -> str:
        """Heading in a narrow table."""
        return self.short or self.label

    def number(self, value: float, *, sign: bool = False) -> str:
        """Format a value with a true minus sign."""
        if self.percent:
            return f"{value:.{self.digits}%}".replace("-", "−")
        return f"{value:{'+' if sign else ''}.{self.digits}f}".replace("-", "−")


METRICS = {
    "loss": Metric("loss", "mean negative log-likelihood, nats", "lower", compared=True),
    "perplexity": Metric("perplexity", "exponential of the loss", "lower", digits=1),
    "entropy": Metric("entropy", "mean entropy of the prediction, nats", compared=True),
    "ece": Metric("ECE", f"expected calibration error, {BINS} bins of equal width", "lower", compared=True),
    "ece_equal_mass": Metric(
        "equal-mass ECE",
        f"the same over {MASS_BINS} bins of equal numbers (HELM's convention), cut between distinct values",
        "lower",
        compared=True,
        short="ECE, equal mass",
    ),
    "mce": Metric("MCE", "largest gap of an equal-width bin; bins of few tokens make it noisy", "lower"),
    "smooth_ece": Metric("smooth ECE", "smooth ECE (Błasiok and Nakkiran 2023), by relplot, if asked for", "lower"),
    "brier": Metric(
        "Brier score", "mean squared difference of the confidence and being right", "lower", compared=True, short="Brier"
    ),
    "brier_multiclass": Metric(
        "multi-class Brier score", "of answers: mean ``Σ_c (p_c − [c is right])²``", "lower", compared=True
    ),
    "accuracy": Metric("accuracy", "share of right top predictions", "higher", compared=True),
    "accuracy_normalised": Metric(
        "accuracy by length",
        "of answers: the same of the top log-likelihood per character of the choice (lm-eval's ``acc_norm``)",
        "higher",
        compared=True,
        short="by length",
    ),
    "auroc": Metric("AUROC", "of confidence as a score for being right; ½ is chance", "higher", compared=True),
    "selective_accuracy": Metric("selective accuracy", f"accuracy on the {SELECTED:.0%} most confident (HELM)", "higher"),
    "coverage_area": Metric("coverage area", "area under accuracy on the c most confident against c (HELM)", "higher"),
    "kl_model_unigram": Metric("KL(model ‖ unigram)", "mean KL(P_model ‖ P_freq), nats", compared=True, digits=3),
    "kl_unigram_model": Metric("KL(unigram ‖ model)", "mean KL(P_freq ‖ P_model), nats", digits=3),
    "argmax_changed": Metric(
        "argmax changed", "share of top predictions that are not the unsteered model's", digits=1, percent=True
    ),
}
"""The table of all metrics, in their order. Tables, reports, paired differences and this page read it."""

# Add the same table to the docstring, for the reference.
__doc__ = "\n".join(
    [
        str(__doc__),
        "| name | definition |",
        "|---|---|",
        *(f"| ``{name}`` | {metric.definition} |" for name, metric in METRICS.items()),
    ]
)


def token_metrics(scores: TokenScores, blocks: Blocks, *, unsteered: TokenScores, smooth: bool = False) -> Estimates:
    """Compute all metrics of next-token predictions, except the divergences.

    Args:
        scores: scores of the predictions to judge.
        blocks: that the tokens are in.
        unsteered: scores of the same tokens without steering.
        smooth: whether to compute smooth ECE.
    """
    loss = blocks.mean(scores.nll)
    return {
        "loss": loss,
        "perplexity": loss.map(torch.exp),
        "entropy": blocks.mean(scores.entropy),
        **calibration_metrics(scores.confidence, scores.correct, blocks, smooth=smooth),
        "argmax_changed": blocks.mean(scores.prediction != unsteered.prediction),
    }


def answer_metrics(log_likelihood: Tensor, gold: Tensor, blocks: Blocks) -> Estimates:
    """Compute all metrics of multiple-choice answers.

    Args:
        log_likelihood: of each choice, ``[questions, choices]``; −∞ where a question has fewer.
        gold: index of the right choice, ``[questions]``.
        blocks: that the questions are in.
    """
    share = log_likelihood.double().softmax(dim=-1)
    log_share = log_likelihood.double().log_softmax(dim=-1)
    confidence, prediction = share.max(dim=-1)
    right = torch.nn.functional.one_hot(gold, share.shape[1])
    return {
        "loss": blocks.mean(-log_share.gather(1, gold[:, None])[:, 0]),
        "entropy": blocks.mean(torch.special.entr(share).sum(dim=-1)),
        **calibration_metrics(confidence.float(), prediction == gold, blocks),
        "brier_multiclass": blocks.mean((share - right).square().sum(dim=-1)),
    }


def chance_metrics(choices: Tensor, blocks: Blocks) -> Estimates:
    """Compute the expected metrics of guessing, when all choices of a question are alike.

    Args:
        choices: number of choices of each question, ``[questions]``.
        blocks: that the questions are in.
    """
    share = 1 / choices.double()
    return {
        "loss": blocks.mean(-share.log()),
        "entropy": blocks.mean(-share.log()),
        "brier": blocks.mean(share * (1 - share)),
        "accuracy": blocks.mean(share),
        "brier_multiclass": blocks.mean(1 - share),
    }


def calibration_metrics(confidence: Tensor, correct: Tensor, blocks: Blocks, *, smooth: bool = False) -> Estimates:
    """Measure how well confidences agree with being right.

    Metrics that need both right and wrong predictions are left out if one kind is missing.

    Args:
        confidence: ``[n]``, probabilities.
        correct: ``[n]`` bool.
        blocks: that the n are in.
        smooth: whether to compute smooth ECE too, which takes a second per ten thousand and the package relplot.
    """
    gap = confidence.double() - correct.double()
    ece, mce = width_calibration_error(confidence, correct, blocks)
    found = {
        "ece": ece,
        "ece_equal_mass": _calibration_error(gap, *equal_mass_bins(confidence, MASS_BINS), blocks)[0],
        "mce": mce,
        "brier": blocks.mean(gap.square()),
        "accuracy": blocks.mean(correct),
        **_ranking(confidence, correct, blocks),
    }
    if smooth:
        found["smooth_ece"] = _smooth_ece(confidence, correct, blocks)
    return found


def width_bins(confidence: Tensor) -> Tensor:
    """Find the equal-width bin of each confidence ``[n]``. Bins are ``[a, b)``, and the last includes 1."""
    return (confidence.double() * BINS).long().clamp_max(BINS - 1)


def equal_mass_bins(values: Tensor, bins: int) -> tuple[Tensor, int]:
    """Find the bin of each of the values ``[n]``, and the number of bins.

    Bins hold equal numbers, except that equal values stay together. A bin that split equal values would depend on their order.
    """
    ordered = values.sort().values
    edges = ordered[torch.arange(1, bins) * len(values) // bins].unique()
    # Begin a bin with the value that it is cut at. Make no cut before the smallest.
    edges = edges[edges > ordered[0]]
    return torch.searchsorted(edges, values, right=True), len(edges) + 1


def width_calibration_error(confidence: Tensor, correct: Tensor, blocks: Blocks) -> tuple[Resampled, Resampled]:
    """Compute ECE and MCE over `BINS` equal-width bins; see `calibration_metrics`."""
    return _calibration_error(confidence.double() - correct.double(), width_bins(confidence), BINS, blocks)


def _calibration_error(gap: Tensor, bin_of: Tensor, bins: int, blocks: Blocks) -> tuple[Resampled, Resampled]:
    """Compute the mean gap of bins, weighted by their numbers, and the largest gap: ECE and MCE."""
    gaps, numbers = blocks.sums(gap, bin_of, bins), blocks.sums(torch.ones_like(gap), bin_of, bins)
    drawn_gaps, drawn_numbers = blocks.weights @ gaps, blocks.weights @ numbers
    gaps, numbers = gaps.sum(dim=0), numbers.sum(dim=0)
    shares = drawn_gaps / drawn_numbers.sum(dim=-1, keepdim=True)
    means = gaps / numbers.clamp_min(1)
    # Ignore a bin in resamples that do not have it.
    drawn_means = torch.where(drawn_numbers > 0, drawn_gaps / drawn_numbers.clamp_min(1), means)
    return (
        resampled_norm(lambda u: u.abs().sum(dim=-1), gaps / numbers.sum(), shares),
        resampled_norm(lambda u: u.abs().amax(dim=-1), means, drawn_means),
    )


def _ranking(confidence: Tensor, correct: Tensor, blocks: Blocks) -> Estimates:
    """Estimate AUROC, selective accuracy and coverage area.

    The values are exact. Resamples use `RANK_BINS` bins of equal mass, within which confidences count as equal. They are shifted
    by the effect of that on the value.
    """
    _, group = (-confidence).unique(return_inverse=True)
    ones, is_right = torch.ones(len(correct)), correct.float()
    numbers, right = (torch.bincount(group, weights=w.double())[None] for w in (ones, is_right))
    exact = ranking_metrics(numbers, right)
    coarse_bin, bins = equal_mass_bins(-confidence, RANK_BINS)
    numbers, right = (blocks.sums(w, coarse_bin, bins) for w in (ones, is_right))
    coarse = ranking_metrics(numbers.sum(dim=0)[None], right.sum(dim=0)[None])
    draws = ranking_metrics(blocks.weights @ numbers, blocks.weights @ right)
    return {
        name: Resampled(float(value), draws[name] + (value - coarse[name]), UNIT)
        for name, value in exact.items()
        if value.isfinite().all() and draws[name].isfinite().any()
    }


def ranking_metrics(numbers: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Compute AUROC, selective accuracy and coverage area, ``[sets]`` each. AUROC is NaN if all are right or all are wrong.

    Args:
        numbers: number of predictions at each confidence, float64 ``[sets, confidences]``, the highest confidence first.
        right: number of right ones among them.
    """
    wrong = numbers - right
    total, total_right, total_wrong = (x.sum(dim=-1) for x in (numbers, right, wrong))
    # Count half of the equal confidences as before: they are in no order.
    above_right = right.cumsum(dim=-1) - right / 2
    auroc = (wrong * above_right).sum(dim=-1) / (total_right * total_wrong)
    accuracy = right / numbers.clamp_min(torch.finfo(numbers.dtype).tiny)
    before, right_before = numbers.cumsum(dim=-1) - numbers, right.cumsum(dim=-1) - right
    # ∫ (R + a (x − N)) / x dx over a group that begins after N predictions, R of them right, and has accuracy a.
    end = before + numbers
    ratio = torch.where(before > 0, end / before.clamp_min(1), 1.0)
    area = accuracy * numbers + (right_before - accuracy * before) * ratio.clamp_min(1).log()
    inside = (SELECTED * total[:, None] - before).clamp_min(0).minimum(numbers)
    return {
        "auroc": auroc,
        "selective_accuracy": (inside * accuracy).sum(dim=-1) / (SELECTED * total),
        "coverage_area": area.sum(dim=-1) / total,
    }


def _smooth_ece(confidence: Tensor, correct: Tensor, blocks: Blocks) -> Resampled:
    import relplot

    confidence, correct = confidence.double(), correct.double()

    def error(rows: Tensor) -> float:
        return float(relplot.smECE(confidence[rows].numpy(), correct[rows].numpy()))

    everything = torch.arange(len(confidence))
    drawn = blocks.weights[:SMOOTH_RESAMPLES].long()
    resampled = [error(everything.repeat_interleave(weights[blocks.index])) for weights in drawn]
    value, draws = error(everything), torch.tensor(resampled, dtype=torch.float64)
    # Recentre the draws on the estimate: noise biases it upwards, and resampling adds noise again.
    return Resampled(value, draws - draws.mean() + value, UNIT)
