"""Multiple-choice questions: calibration of the confidence in the answers.

The answer is the choice that is likeliest after the question. The confidence in it is its share of the probability of all
choices. Log-likelihoods are those of lm-eval's ``multiple_choice``. The model runs once over the questions. Every steering and
every temperature then follows in closed form (`confsteer.last_layer.text_states`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.bars import progress_bar
from confsteer.errors import CorpusError
from confsteer.evaluation.answers import AnswerCandidate, answer_entropy, baselines, match_answer_entropy
from confsteer.evaluation.choice_sample import BlockUnit, ChoiceSample, read_choices, with_own_fields
from confsteer.evaluation.comparison import ComparedRow, RowKind, accuracy_at_coverages, paired_differences, reliability_bins
from confsteer.evaluation.metrics import Estimates, answer_metrics, chance_metrics
from confsteer.evaluation.reader import Reader, interventions_of
from confsteer.last_layer.intervention import Intervention
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import Blocks, Interval, mean
from confsteer.results.result import Result
from confsteer.steering import Steering
from confsteer.text.prompts import AS_TEXT, Wording
from confsteer.text.questions import Question

GROUPED = ("accuracy", "loss", "entropy", "ece", "brier")
"""Metrics that are computed for groups of questions."""


class AnswerGroup(Result):
    """Questions with the same value in a field of their records."""

    name: str
    questions: int
    metrics: tuple[dict[str, Interval], ...]
    """Metrics `GROUPED` of each row of the comparison, over this group only."""


class AnswerGroups(Result):
    """Questions in groups."""

    by: str
    """Field of the records."""
    groups: tuple[AnswerGroup, ...]
    macro: tuple[dict[str, Interval], ...]
    """Mean of each row's metrics over groups, which count equally. The row itself has them over all questions."""


class ChoiceComparison(Result):
    """Ways to answer the same questions. The first row is neutral.

    The values of a row of kind ``temperature`` or ``matched temperature`` divide the log-likelihoods of whole choices.
    """

    source: str
    wording: str = "text"
    """Words of the questions; see `confsteer.text.prompts.Wording`."""
    example: str = ""
    """The first question as the model read it, to the end of its first choice."""
    choices: tuple[str, ...] = ()
    """Text of each choice of that question."""
    questions: int
    truncated: int
    """Questions that do not fit the model's context with all of their choices and lost their beginning."""
    blocks: int
    """Number of units that the intervals resample."""
    unit: BlockUnit
    rows: tuple[ComparedRow, ...]
    grouped: AnswerGroups | None = None

    @property
    def title(self) -> str:
        """Name of the questions, and of their wording."""
        return f"{self.source} ({self.wording})"

    def of_kind(self, kind: RowKind) -> tuple[ComparedRow, ...]:
        """Select the rows of a kind, in order."""
        return tuple(row for row in self.rows if row.kind == kind)


class Answered(NamedTuple):
    """Questions, and every way in which they were answered."""

    comparison: ChoiceComparison
    sample: ChoiceSample
    candidates: Sequence[AnswerCandidate]

    def records(self) -> Iterator[dict[str, Any]]:
        """Make a flat record of each question and way to answer, except chance.

        Fields of the question's own record keep their names. If confsteer uses the name, ``record_`` is put before it.
        """
        for candidate in self.candidates:
            if candidate.kind == "chance":
                continue
            share = candidate.log_likelihood.softmax(dim=-1)
            for i, question in enumerate(self.sample.questions):
                number = len(question.choices)
                scores = candidate.log_likelihood[i, :number]
                prediction = int(scores.argmax())
                record = {
                    "source": self.comparison.source,
                    "wording": self.comparison.wording,
                    "way": candidate.name,
                    "id": question.id,
                    "choices": list(question.choices),
                    "answer": question.answer,
                    "scores": scores.tolist(),
                    "prediction": prediction,
                    "confidence": float(share[i, prediction]),
                    "correct": prediction == question.answer,
                    "block": int(self.sample.block[i]),
                }
                yield with_own_fields(record, question.record)


def evaluate_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence[Question]],
    profile: Profile,
    steerings: Sequence[Steering],
    *,
    wordings: Sequence[Wording] = (AS_TEXT,),
    by: str | None = None,
    progress: bool = False,
) -> tuple[ChoiceComparison, ...]:
    """Compare accuracy and calibration of answers: unsteered, with each of `steerings`, and with the baselines of each.

    Each has to beat a temperature on the log-likelihoods of whole choices. It changes the confidence in the answers, but not the
    answers. It is fitted on every other block of questions and used on the rest, and the other way round.
    `confsteer.evaluation.answers.baselines` lists the other ways. Each steering also has a temperature beside it that gives the
    unsteered model's answers the same mean entropy.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        questions: questions by the name of their source; see `confsteer.text.questions.read_questions`.
        profile: see `confsteer.steer`.
        steerings: steerings to compare with the unsteered model. All must be for every position.
        wordings: wordings of the questions, one after the other.
        by: field of the questions' records to group them by.
        progress: whether to show progress bars.

    Returns:
        A comparison for each name and wording.

    Raises:
        CorpusError: there are too few questions, or one has no field `by`. Or a choice has no token of its own, or more than the
            model can read. Or a wording does not fit a question.
        SteeringError, ProfileMismatchError, NoNeuronsError: see `confsteer.steer`, or the model is being steered.
        UnsupportedModelError: see `confsteer.model.dissect` and `confsteer.model.states.check_closed_form`.
    """
    # Validate the steerings before the model runs.
    interventions_of(steerings, profile)
    reader = Reader(model, profile)
    found = answer(reader, tokenizer, questions, steerings, wordings=wordings, by=by, progress=progress)
    return tuple(one.comparison for one in found)


def answer(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence[Question]],
    steerings: Sequence[Steering],
    *,
    wordings: Sequence[Wording] = (AS_TEXT,),
    by: str | None = None,
    progress: bool = False,
) -> Iterator[Answered]:
    """Answer one set of questions after the other. The arguments are those of `evaluate_choices`."""
    names = [str(steering) for steering in steerings]
    resolved, interventions = interventions_of(steerings, reader.profile)
    for source, asked in questions.items():
        for wording in wordings:
            sample = read_choices(reader, tokenizer, asked, source=source, wording=wording, progress=progress)
            unsteered = Intervention.neutral(sample.reading.readout.n_neurons)
            label = f"compare on {source}"
            with progress_bar(label, sample.reading.tokens, show=progress) as bar:
                neutral, *every = sample.log_likelihoods([unsteered, *interventions], bar.update)
            candidates = baselines(sample, neutral)
            for name, steering, steered in zip(names, resolved, every, strict=True):
                candidates += steered_and_matched(name, steering, steered, neutral)
            yield Answered(compare_answers(sample, candidates, wording=wording, by=by), sample, candidates)


def steered_and_matched(name: str, steering: Steering, steered: Tensor, neutral: Tensor) -> list[AnswerCandidate]:
    """Pair a steering with the temperature that gives the unsteered model's answers the same mean entropy."""
    matched = match_answer_entropy(neutral, answer_entropy(steered))
    like = f"temperature, entropy as {name}"
    return [
        AnswerCandidate(name, "steering", steered, steering),
        AnswerCandidate(like, "matched temperature", neutral / matched, steering, (matched,)),
    ]


def compare_answers(
    sample: ChoiceSample, candidates: Sequence[AnswerCandidate], *, wording: Wording = AS_TEXT, by: str | None = None
) -> ChoiceComparison:
    """Compute every metric of every candidate, and the differences that matter.

    Args:
        sample: the questions.
        candidates: ways to answer. The first is neutral.
        wording: their wording.
        by: see `evaluate_choices`.

    Raises:
        CorpusError: a question has no field `by`.
    """
    blocks = Blocks(sample.block)
    estimates = [_estimates(sample, candidate, candidates[0], blocks) for candidate in candidates]
    rows = []
    for i, candidate in enumerate(candidates):
        confidence, prediction = candidate.log_likelihood.softmax(dim=-1).max(dim=-1)
        correct = prediction == sample.gold
        guesses = candidate.kind == "chance"
        rows.append(
            ComparedRow(
                name=candidate.name,
                kind=candidate.kind,
                steering=candidate.steering,
                values=candidate.values,
                metrics={name: estimate.interval for name, estimate in estimates[i].items()},
                minus=paired_differences(i, [(other.kind, other.steering) for other in candidates], estimates),
                reliability=() if guesses else reliability_bins(confidence, correct, blocks),
                coverage=() if guesses else accuracy_at_coverages(confidence, correct),
            )
        )
    first = sample.asked[0]
    return ChoiceComparison(
        source=sample.source,
        wording=wording.title,
        example=first.verbatim(),
        choices=first.continuations if len(set(first.contexts)) == 1 else sample.questions[0].choices,
        questions=len(sample.questions),
        truncated=sample.truncated,
        blocks=blocks.number,
        unit=sample.unit,
        rows=tuple(rows),
        grouped=None if by is None else _grouped(sample, candidates, by),
    )


def _estimates(sample: ChoiceSample, candidate: AnswerCandidate, neutral: AnswerCandidate, blocks: Blocks) -> Estimates:
    score = candidate.log_likelihood
    if candidate.kind == "chance":
        return chance_metrics(sample.inside.sum(dim=1), blocks)
    found = answer_metrics(score, sample.gold, blocks)
    found["argmax_changed"] = blocks.mean(score.argmax(dim=-1) != neutral.log_likelihood.argmax(dim=-1))
    if candidate.kind in ("neutral", "temperature", "steering", "matched temperature"):
        found["accuracy_normalised"] = blocks.mean((score / sample.characters).argmax(dim=-1) == sample.gold)
    return found


def field_of(question: Question, by: str, where: str) -> str:
    """Read the field that questions are grouped by.

    Raises:
        CorpusError: the question does not have it.
    """
    if by not in question.record:
        known = ", ".join(map(repr, question.record)) or "none"
        raise CorpusError(f"{where} has no field {by!r} to group by, a string, number or truth value; its fields are: {known}")
    return str(question.record[by])


def _grouped(sample: ChoiceSample, candidates: Sequence[AnswerCandidate], by: str) -> AnswerGroups:
    """Compute the metrics of each group of questions, resampled by itself, and their means over groups."""
    names = [field_of(one, by, f"{sample.source}, question {i}") for i, one in enumerate(sample.questions, start=1)]
    groups, estimates = [], []
    for number, name in enumerate(dict.fromkeys(names)):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name])
        blocks, gold = Blocks(sample.block[rows], seed=number), sample.gold[rows]
        found: list[Estimates] = []
        for candidate in candidates:
            if candidate.kind == "chance":
                metrics = chance_metrics(sample.inside[rows].sum(dim=1), blocks)
            else:
                metrics = answer_metrics(candidate.log_likelihood[rows], gold, blocks)
            found.append({metric: metrics[metric] for metric in GROUPED if metric in metrics})
        estimates.append(found)
        intervals = tuple({metric: one.interval for metric, one in row.items()} for row in found)
        groups.append(AnswerGroup(name=name, questions=len(rows), metrics=intervals))
    macro = tuple(
        {metric: mean([found[i][metric] for found in estimates]).interval for metric in estimates[0][i]}
        for i in range(len(candidates))
    )
    return AnswerGroups(by=by, groups=tuple(groups), macro=macro)
