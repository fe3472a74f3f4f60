"""Ways to predict the same text, compared with each other, for the reports of `evaluate` and `tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from confsteer.evaluation.metrics import BINS, METRICS, Estimates, equal_mass_bins, token_metrics, width_bins
from confsteer.last_layer.coordinates import Coordinates
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.scores import TokenScores, UnigramDivergences
from confsteer.last_layer.text_states import OnTokens, TextStates, unnoticed
from confsteer.last_layer.unigram import Unigram
from confsteer.results.bootstrap import Blocks, Interval
from confsteer.results.result import Result
from confsteer.steering import Steering

RowKind = Literal[
    "neutral",
    "chance",
    "temperature",
    "temperature and length",
    "scoring",
    "null write",
    "steering",
    "matched temperature",
]
FREQUENCY_GROUPS = 10
ENTROPY_BINS = 40
COVERAGES = tuple(i / 20 for i in range(1, 21))


class ReliabilityBin(Result):
    """Predictions whose confidence falls into ``[low, high)``."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean top probability."""
    accuracy: Interval
    """Share of right top predictions, with the interval over resampled blocks."""


class FrequencyGroup(Result):
    """A tenth of the text's tokens, about equally frequent in the unigram distribution."""

    low: float
    """Smallest and largest probability in the unigram distribution."""
    high: float
    count: int
    loss: float
    entropy: float
    confidence: float
    accuracy: float


class ComparedRow(Result):
    """One way to predict, compared with others."""

    name: str
    kind: RowKind
    steering: Steering | None = None
    """Steering of the row. For a matched temperature, the steering whose mean entropy it has."""
    values: tuple[float, ...] = ()
    """The temperature, or the constant written along the null direction (in units of the residual), one per fold.

    A temperature with length has three numbers per fold: the temperature, nats per token and nats per character."""
    metrics: dict[str, Interval]
    """Metrics, by the names in `confsteer.evaluation.metrics`."""
    minus: dict[RowKind, dict[str, Interval]] = Field(default_factory=dict)
    """Paired differences: this row's metric less that of the row of a kind (for matched temperatures, its own)."""
    reliability: tuple[ReliabilityBin, ...]
    """Equal-width bins that hold predictions."""
    coverage: tuple[float, ...]
    """Accuracy on the most confident 5 %, 10 %, … 100 %."""


class Row(ComparedRow):
    """One way to predict the text."""

    entropies: tuple[float, ...]
    """Share of tokens in each of `ENTROPY_BINS` equal bins, from 0 to the logarithm of the vocabulary's size."""
    frequency: tuple[FrequencyGroup, ...]
    """Groups of tokens, the rarest first."""


class TextComparison(Result):
    """Ways to predict one text. The first row is neutral."""

    source: str
    tokens: int
    """Number of tokens scored."""
    windows: int
    blocks: int
    """Number of units that are resampled for the intervals."""
    unit: Literal["documents", "windows"]
    vocab_size: int
    rows: tuple[Row, ...]

    def of_kind(self, kind: RowKind) -> tuple[Row, ...]:
        """Select the rows of a kind, in order."""
        return tuple(row for row in self.rows if row.kind == kind)


class Scored(NamedTuple):
    """Scores of a text's predictions."""

    scores: TokenScores
    divergences: UnigramDivergences


class Candidate(NamedTuple):
    """A way to predict."""

    name: str
    kind: RowKind
    folds: Sequence[tuple[Tensor, Intervention]]
    """Indices of tokens, and the intervention on them. Together they are all tokens."""
    steering: Steering | None = None
    scored: Scored | None = None
    """Its predictions, if they are computed already."""

    @property
    def values(self) -> tuple[float, ...]:
        """The one number of a baseline, per fold."""
        if self.kind == "null write":
            return tuple(float(intervention.null_write) for _, intervention in self.folds)
        return tuple(float(i.temperature) for _, i in self.folds) if "temperature" in self.kind else ()


class Sample(NamedTuple):
    """A text to compare on."""

    source: str
    reading: TextStates
    block: Tensor
    """Resampling block of each token, ``[tokens]``."""
    unit: Literal["documents", "windows"]

    def predict(
        self, candidates: Sequence[Candidate], unigram: Unigram, *, sample: bool = False, on_tokens: OnTokens = unnoticed
    ) -> list[Candidate]:
        """Compute the predictions of candidates that have none, in one pass over the vocabulary.

        Args:
            candidates: ways to predict this text.
            unigram: the distribution that divergences are measured from.
            sample: whether to sample the vocabulary in the same pass, which fits need.
            on_tokens: see `TextStates.predict`.
        """
        missing = [i for i, candidate in enumerate(candidates) if candidate.scored is None]
        wanted = [self._coordinates(candidates[i].folds) for i in missing]
        found = self.reading.predict(wanted, unigram, sample=sample, on_tokens=on_tokens)
        done = list(candidates)
        for i, predictions in zip(missing, found, strict=True):
            done[i] = done[i]._replace(scored=Scored(predictions.scores, predictions.divergences))
        return done

    def _coordinates(self, folds: Sequence[tuple[Tensor, Intervention]]) -> Coordinates:
        """Put the coordinates of each fold's intervention in the order of the tokens."""
        parts = [self.reading.coordinates(intervention).at(rows) for rows, intervention in folds]
        return Coordinates.join(parts, torch.cat([rows for rows, _ in folds]).argsort())

    def everywhere(self, intervention: Intervention) -> Sequence[tuple[Tensor, Intervention]]:
        """Use one intervention for all tokens, in the form of `Candidate.folds`."""
        return [(torch.arange(self.reading.tokens), intervention)]

    def cross_fitted(
        self, fitter: Callable[[Sequence[TextStates]], Intervention], most: int
    ) -> list[tuple[Tensor, Intervention]]:
        """Fit on every other block and use the fit on the rest, and the other way round.

        No fit judges a token that it saw.

        Args:
            fitter: function from texts to an intervention.
            most: approximate limit of the tokens to fit on.
        """
        _, order = self.block.unique(return_inverse=True)
        halves = [(order % 2 == side).nonzero()[:, 0] for side in (0, 1)]
        folds = []
        for use, seen in (halves, halves[::-1]):
            blocks = order[seen]
            # Take whole blocks, spread over the text.
            stride = max(1, len(seen) // most)
            few = seen[(blocks // 2) % stride == 0]
            folds.append((use, fitter([self.reading.at(few)])))
        return folds


def compare(
    sample: Sample,
    candidates: Sequence[Candidate],
    unigram: Unigram,
    *,
    smooth_ece: bool = False,
    on_tokens: OnTokens = unnoticed,
) -> TextComparison:
    """Compute every metric of every candidate, and the differences that matter.

    Args:
        sample: the text.
        candidates: ways to predict. The first is neutral, and a matched temperature follows its steering.
        unigram: the unigram distribution for divergences and frequencies.
        smooth_ece: whether to compute smooth ECE, which is slow.
        on_tokens: called with the number of tokens after each block of the pass over the vocabulary.
    """
    blocks = Blocks(sample.block)
    target_log_frequency = unigram.log_frequency.cpu()[sample.reading.states.targets.cpu()]
    group, groups = equal_mass_bins(target_log_frequency, FREQUENCY_GROUPS)

    # Score the text with each candidate. The first, unsteered, is the one to compare with.
    scored: list[TokenScores] = []
    estimates: list[Estimates] = []
    for candidate in sample.predict(candidates, unigram, on_tokens=on_tokens):
        assert candidate.scored is not None
        scores, divergences = candidate.scored
        scored.append(scores)
        found = token_metrics(scores, blocks, unsteered=scored[0], smooth=smooth_ece)
        estimates.append(found | {name: blocks.mean(values) for name, values in divergences._asdict().items()})

    # Make the rows after all are scored, because differences are between rows.
    def row(i: int) -> Row:
        candidate, scores = candidates[i], scored[i]
        return Row(
            name=candidate.name,
            kind=candidate.kind,
            steering=candidate.steering,
            values=candidate.values,
            metrics={name: estimate.interval for name, estimate in estimates[i].items()},
            minus=paired_differences(i, [(candidate.kind, candidate.steering) for candidate in candidates], estimates),
            reliability=reliability_bins(scores.confidence, scores.correct, blocks),
            coverage=accuracy_at_coverages(scores.confidence, scores.correct),
            entropies=_histogram(scores.entropy, sample.reading.readout.vocab_size),
            frequency=tuple(_frequency_group(scores, target_log_frequency.exp(), group == g) for g in range(groups)),
        )

    return TextComparison(
        source=sample.source,
        tokens=sample.reading.tokens,
        windows=len(sample.reading.states.window.unique()),
        blocks=blocks.number,
        unit=sample.unit,
        vocab_size=sample.reading.readout.vocab_size,
        rows=tuple(row(i) for i in range(len(candidates))),
    )


def paired_differences(
    i: int, candidates: Sequence[tuple[RowKind, Steering | None]], estimates: Sequence[Estimates]
) -> dict[RowKind, dict[str, Interval]]:
    """Subtract from a candidate's metrics those of the candidates it is compared with; see `ComparedRow.minus`.

    Args:
        i: index of the candidate.
        candidates: kind and steering of each.
        estimates: of each.
    """
    _, steering = candidates[i]
    against: dict[RowKind, Estimates] = {}
    for j, (kind, of) in enumerate(candidates):
        matches = kind == "matched temperature" and of == steering
        if i != j and (kind in ("neutral", "chance", "temperature", "null write") or matches):
            against[kind] = estimates[j]
    ours = estimates[i]
    return {
        kind: {
            name: (ours[name] - other[name]).interval
            for name, metric in METRICS.items()
            if metric.compared and name in ours.keys() & other
        }
        for kind, other in against.items()
    }


def reliability_bins(confidence: Tensor, correct: Tensor, blocks: Blocks) -> tuple[ReliabilityBin, ...]:
    """Make the equal-width bins that hold predictions, from confidences ``[n]`` and whether predictions are right ``[n]``."""
    bins = width_bins(confidence)
    found = []
    for i in bins.unique().tolist():
        inside = bins == i
        # Leave resamples with an empty bin, which give NaN, out of the interval.
        share = blocks.total(inside & correct) / blocks.total(inside)
        found.append(
            ReliabilityBin(
                low=i / BINS,
                high=(i + 1) / BINS,
                count=int(inside.sum()),
                confidence=float(confidence[inside].double().mean()),
                accuracy=share.interval,
            )
        )
    return tuple(found)


def accuracy_at_coverages(confidence: Tensor, correct: Tensor) -> tuple[float, ...]:
    """Compute accuracy on the most confident shares `COVERAGES`. Among equal confidences, all are equally likely to be taken."""
    _, group, numbers = (-confidence).unique(return_inverse=True, return_counts=True)
    accuracy = torch.bincount(group, weights=correct.double()) / numbers
    right = accuracy.repeat_interleave(numbers).cumsum(dim=0)
    numbers = [max(1, round(c * len(right))) for c in COVERAGES]
    return tuple(float(right[n - 1]) / n for n in numbers)


def _histogram(entropy: Tensor, vocab_size: int) -> tuple[float, ...]:
    counts = entropy.double().histc(ENTROPY_BINS, 0, float(torch.tensor(vocab_size).double().log()))
    return tuple((counts / len(entropy)).tolist())


def _frequency_group(scores: TokenScores, frequency: Tensor, inside: Tensor) -> FrequencyGroup:
    def mean(values: Tensor) -> float:
        return float(values[inside].double().mean())

    return FrequencyGroup(
        low=float(frequency[inside].min()),
        high=float(frequency[inside].max()),
        count=int(inside.sum()),
        loss=mean(scores.nll),
        entropy=mean(scores.entropy),
        confidence=mean(scores.confidence),
        accuracy=mean(scores.correct),
    )
