"""Short questions answered in a model's own words: calibration of five confidences in the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confsteer.defaults import SAMPLES
from confsteer.evaluation.choice_sample import BlockUnit, with_own_fields
from confsteer.evaluation.comparison import ComparedRow, accuracy_at_coverages, reliability_bins
from confsteer.evaluation.confidences import CONFIDENCES, ConfidenceName, PromptName
from confsteer.evaluation.metrics import METRICS, Estimates, calibration_metrics
from confsteer.evaluation.reader import Reader
from confsteer.evaluation.written_sample import WrittenSample, WrittenWay, write_sample
from confsteer.results.bootstrap import Blocks, Interval
from confsteer.results.result import Result
from confsteer.steering import Steering
from confsteer.text.prompts import IN_WORDS, ShortWording
from confsteer.text.short_questions import ShortQuestion


class WrittenAnswers(Result):
    """Answers of the model under one steering."""

    name: str
    steering: Steering
    right: int
    mentioned: int | None = None
    """Wrong answers with the words of an accepted one among others; None in results made before these were counted."""
    accuracy: Interval
    less_unsteered: Interval | None = None
    """Paired difference of the accuracy to the unsteered model's. None for the unsteered model itself."""
    changed: int
    """Number of answers that differ from the unsteered model's after normalisation."""
    became_right: int
    became_wrong: int
    cut_off: int
    """Number of answers that were cut off."""
    empty: int
    """Number of answers with nothing to compare."""


class ConfidenceComparison(Result):
    """Values of one confidence: the unsteered model's first, then the maps fitted to it, and each steering's own."""

    confidence: ConfidenceName
    rows: tuple[ComparedRow, ...]
    """Rows. Metrics are over the questions that have a confidence. A row of kind ``temperature`` has a temperature of tokens for
    each half, or a slope and a constant."""

    def stated(self, row: ComparedRow) -> int:
        """Count the answers that have a confidence."""
        return sum(one.count for one in row.reliability)


class WrittenComparison(Result):
    """Ways to answer the same short questions."""

    source: str
    wording: str
    prompts: dict[PromptName, str]
    """Texts that the model read, verbatim: the first question, and the prompts about its answer."""
    questions: int
    truncated: int
    """Number of questions that lost their beginning, because they do not fit the model's context."""
    samples: int
    """Number of samples of each answer, for self-consistency."""
    blocks: int
    """Number of units that the intervals resample."""
    unit: BlockUnit
    answers: tuple[WrittenAnswers, ...]
    """Answers, the unsteered model's first."""
    confidences: tuple[ConfidenceComparison, ...]

    @property
    def title(self) -> str:
        """Name of the questions, and of their wording."""
        return f"{self.source} ({self.wording})"


class WrittenAnswered(NamedTuple):
    """Short questions, and every way in which they were answered."""

    comparison: WrittenComparison
    sample: WrittenSample

    def records(self) -> Iterator[dict[str, Any]]:
        """Make a flat record of each question and way to answer, with every confidence.

        Fields of the question's own record keep their names. If confsteer uses the name, ``record_`` is put before it.
        """
        for way in self.sample.ways:
            for i, question in enumerate(self.sample.questions):
                stated = {name: float(way.confidence[name][i]) for name in CONFIDENCES}
                record: dict[str, Any] = {
                    "source": self.comparison.source,
                    "wording": self.comparison.wording,
                    "way": way.name,
                    "id": question.id,
                    "answer": way.texts[i],
                    "accepted": list(question.answers),
                    "correct": bool(way.correct[i]),
                    "changed": bool(way.changed[i]),
                    "cut_off": not bool(way.ended[i]),
                    # Write None: JSON has no NaN.
                    **{name: value if value == value else None for name, value in stated.items()},
                    "block": int(self.sample.block[i]),
                }
                yield with_own_fields(record, question.record)


def answer_in_words(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence[ShortQuestion]],
    steerings: Sequence[Steering],
    *,
    wording: ShortWording = IN_WORDS,
    samples: int = SAMPLES,
    progress: bool = False,
) -> Iterator[WrittenAnswered]:
    """Answer one set of short questions after the other, unsteered and with each steering, and compare.

    Args:
        reader: of the model.
        tokenizer: the model's.
        questions: questions by the name of their source; see `confsteer.text.short_questions.read_short_questions`.
        steerings: steerings. All must be for every position.
        wording: wording of the questions.
        samples: number of samples of each answer, for self-consistency.
        progress: whether to show progress bars.

    Raises:
        CorpusError, SteeringError: see `confsteer.evaluation.written_sample.write_sample`.
    """
    for source, asked in questions.items():
        sample = write_sample(
            reader, tokenizer, asked, steerings, source=source, wording=wording, samples=samples, progress=progress
        )
        yield WrittenAnswered(compare_written(sample), sample)


def compare_written(sample: WrittenSample) -> WrittenComparison:
    """Compute every metric of every confidence, and the differences that matter."""
    blocks = Blocks(sample.block)
    return WrittenComparison(
        source=sample.source,
        wording=sample.wording,
        prompts=sample.prompts,
        questions=len(sample.questions),
        truncated=sample.truncated,
        samples=sample.samples,
        blocks=blocks.number,
        unit=sample.unit,
        answers=tuple(_answers(way, sample.ways[0], blocks) for way in sample.ways if way.steering is not None),
        confidences=tuple(
            ConfidenceComparison(confidence=name, rows=_rows(name, sample.ways, sample.block)) for name in CONFIDENCES
        ),
    )


def _answers(way: WrittenWay, unsteered: WrittenWay, blocks: Blocks) -> WrittenAnswers:
    accuracy = blocks.mean(way.correct)
    assert way.steering is not None
    return WrittenAnswers(
        name=way.name,
        steering=way.steering,
        right=int(way.correct.sum()),
        mentioned=int(way.mentioned.sum()),
        accuracy=accuracy.interval,
        less_unsteered=None if way is unsteered else (accuracy - blocks.mean(unsteered.correct)).interval,
        changed=int(way.changed.sum()),
        became_right=int((way.correct & ~unsteered.correct).sum()),
        became_wrong=int((~way.correct & unsteered.correct).sum()),
        cut_off=int((~way.ended).sum()),
        empty=int(way.empty.sum()),
    )


def _rows(name: ConfidenceName, ways: Sequence[WrittenWay], block: Tensor) -> tuple[ComparedRow, ...]:
    """Judge one confidence of each way to answer over the questions where it was stated. Pairs need both."""
    known = [way.confidence[name].isfinite() for way in ways]
    estimates = [_metrics(name, way, rows, block) for way, rows in zip(ways, known, strict=True)]

    def over(i: int, rows: Tensor) -> Estimates:
        return estimates[i] if torch.equal(rows, known[i]) else _metrics(name, ways[i], rows, block)

    def less(i: int, j: int) -> dict[str, Interval]:
        both = known[i] & known[j]
        ours, theirs = over(i, both), over(j, both)
        compared = [key for key, metric in METRICS.items() if metric.compared and key in ours.keys() & theirs]
        return {key: (ours[key] - theirs[key]).interval for key in compared}

    found = []
    for i, way in enumerate(ways):
        stated, correct, some = way.confidence[name][known[i]], way.correct[known[i]], bool(known[i].any())
        found.append(
            ComparedRow(
                name=way.name,
                kind=way.kind,
                steering=way.steering,
                values=way.values.get(name, ()),
                metrics={key: one.interval for key, one in estimates[i].items()},
                # Compare with the first rows: the unsteered model and the maps fitted to it.
                minus={ways[j].kind: difference for j in (0, 1) if j != i and (difference := less(i, j))},
                reliability=reliability_bins(stated, correct, Blocks(block[known[i]])) if some else (),
                coverage=accuracy_at_coverages(stated, correct) if some else (),
            )
        )
    return tuple(found)


def _metrics(name: ConfidenceName, way: WrittenWay, rows: Tensor, block: Tensor) -> Estimates:
    """Compute the metrics of a confidence over some of the questions. Without questions there are none."""
    if not rows.any():
        return {}
    return calibration_metrics(way.confidence[name][rows], way.correct[rows], Blocks(block[rows]))
