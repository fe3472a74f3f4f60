"""Multiple-choice questions: how well the confidence in an answer fits how often it is right.

An answer is the choice that the model finds likeliest after the question, and the confidence in it is its share of the
probability of all choices. Log-likelihoods are those of lm-eval's ``multiple_choice``. The model runs once over the questions;
every steering and every temperature follows in closed form (`confsteer.last_layer.text_states`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confsteer.errors import CorpusError
from confsteer.evaluation.comparison import ComparedRow, RowKind, accuracy_at_coverages, paired_differences, reliability_bins
from confsteer.evaluation.metrics import Estimates, answer_metrics
from confsteer.evaluation.reader import Reader, interventions_of
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.text_states import OnTokens, TextStates, unnoticed
from confsteer.model.states import record_continuations
from confsteer.profile.profile import Profile
from confsteer.results.bootstrap import Blocks
from confsteer.results.result import Result
from confsteer.steering import Steering
from confsteer.text.questions import Question
from confsteer.text.windows import context_length, surrounding_ids

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 1e4
"""Temperatures between which fits look. Answers no better than chance are best at the hottest, where all choices are alike."""
HALVINGS = 60
"""Bisections of the range of log-temperatures: more than its ends have digits."""


class ChoiceComparison(Result):
    """Ways to answer the same questions. The first row is neutral.

    The values of a row of kind ``temperature`` or ``matched temperature`` divide the log-likelihoods of whole choices.
    """

    source: str
    questions: int
    truncated: int
    """Questions that do not fit the model's context with all of their choices and lost their beginning."""
    blocks: int
    """Number of units that are resampled for the intervals."""
    unit: Literal["questions", "passages"]
    rows: tuple[ComparedRow, ...]

    def of_kind(self, kind: RowKind) -> tuple[ComparedRow, ...]:
        """Select the rows of a kind, in order."""
        return tuple(row for row in self.rows if row.kind == kind)


class ChoiceSample(NamedTuple):
    """Questions, and their choices as the last layer saw them."""

    source: str
    questions: Sequence[Question]
    reading: TextStates
    """States at the choices' tokens; ``window`` counts through the choices of all questions."""
    block: Tensor
    """Resampling block of each question, ``[questions]``; see `question_blocks`."""
    unit: Literal["questions", "passages"]
    truncated: int
    """See `ChoiceComparison.truncated`."""

    @property
    def gold(self) -> Tensor:
        """Index of the right choice, ``[questions]``."""
        return torch.tensor([question.answer for question in self.questions])

    def padded(self, values: Tensor, padding: float) -> Tensor:
        """Arrange values of all choices ``[choices of all questions]`` by question, ``[questions, most choices]``."""
        parts = values.split([len(question.choices) for question in self.questions])
        return pad_sequence(list(parts), batch_first=True, padding_value=padding)

    def log_likelihoods(self, interventions: Sequence[Intervention], on_tokens: OnTokens = unnoticed) -> list[Tensor]:
        """Score each choice given its question under each intervention, in one pass over the vocabulary.

        Args:
            interventions: to score with.
            on_tokens: see `TextStates.predict`.

        Returns:
            Nats, float64 ``[questions, most choices]`` each; −∞ where a question has fewer choices.
        """
        reading = self.reading
        predictions = reading.predict([reading.coordinates(one) for one in interventions], on_tokens=on_tokens)
        zeros = torch.zeros(sum(len(question.choices) for question in self.questions), dtype=torch.float64)
        choice = reading.states.window.cpu()
        return [self.padded(zeros.index_add(0, choice, -one.scores.nll.double()), -math.inf) for one in predictions]

    def cross_fitted_temperature(self, log_likelihood: Tensor) -> AnswerCandidate:
        """Fit a temperature on every other block and use it on the rest, and the other way round.

        No question is judged by a fit that saw it.

        Args:
            log_likelihood: of the unsteered model, as `log_likelihoods` has it.
        """
        _, order = self.block.unique(return_inverse=True)
        used, temperatures = log_likelihood.clone(), []
        for side in (0, 1):
            use, seen = order % 2 == side, order % 2 != side
            temperatures.append(fit_answer_temperature(log_likelihood[seen], self.gold[seen]))
            used[use] /= temperatures[-1]
        return AnswerCandidate("fitted temperature", "temperature", used, values=tuple(temperatures))


class AnswerCandidate(NamedTuple):
    """A way to answer."""

    name: str
    kind: RowKind
    log_likelihood: Tensor
    """See `ChoiceSample.log_likelihoods`; over a temperature, in a row of one."""
    steering: Steering | None = None
    values: tuple[float, ...] = ()
    """The temperature, one per fold."""


def evaluate_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, Sequence[Question]],
    profile: Profile,
    steerings: Sequence[Steering],
    *,
    progress: bool = False,
) -> tuple[ChoiceComparison, ...]:
    """Compare accuracy and calibration of answers without steering, with each of `steerings`, and with what each has to beat.

    Each has to beat a temperature on the log-likelihoods of whole choices, which leaves the answers and changes the confidence
    in them. One is fitted on every other block of questions and used on the rest, and the other way round. Beside each steering
    stands the one that gives the unsteered model's answers the same mean entropy.

    Args:
        model: the profile's model.
        tokenizer: its tokenizer.
        questions: by the name of where they are from; see `confsteer.text.questions.read_questions`.
        profile: see `confsteer.steer`.
        steerings: to compare with the unsteered model; all for every position.
        progress: whether to show progress bars.

    Returns:
        A comparison for each name.

    Raises:
        CorpusError: there are too few questions, or a choice has no token of its own or more than the model can read.
        SteeringError, ProfileMismatchError, NoNeuronsError: see `confsteer.steer`; or the model is being steered.
        UnsupportedModelError: see `confsteer.model.dissect` and `confsteer.model.states.check_closed_form`.
    """
    # Validate the steerings before the model runs.
    names = [str(steering) for steering in steerings]
    steerings, interventions = interventions_of(steerings, profile)
    compared = []
    reader = Reader(model, profile)
    for source, asked in questions.items():
        sample = read_choices(reader, tokenizer, asked, source=source, progress=progress)
        unsteered = Intervention.neutral(sample.reading.readout.n_neurons)
        label = f"compare on {source}"[:40]
        with tqdm(total=sample.reading.tokens, desc=label, unit="tok", unit_scale=True, disable=not progress) as bar:
            neutral, *every = sample.log_likelihoods([unsteered, *interventions], bar.update)
        candidates = [AnswerCandidate("neutral", "neutral", neutral, Steering()), sample.cross_fitted_temperature(neutral)]
        for name, steering, steered in zip(names, steerings, every, strict=True):
            matched = match_answer_entropy(neutral, _entropy(steered))
            candidates.append(AnswerCandidate(name, "steering", steered, steering))
            like = f"temperature, entropy as {name}"
            candidates.append(AnswerCandidate(like, "matched temperature", neutral / matched, steering, (matched,)))
        compared.append(compare_answers(sample, candidates))
    return tuple(compared)


def read_choices(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    source: str = "questions",
    progress: bool = False,
) -> ChoiceSample:
    """Run the model over questions once and keep what decides how likely each choice is: ``d_model`` numbers a token of it.

    Raises:
        CorpusError: see `evaluate_choices`.
    """
    block, unit = question_blocks(questions)
    if len(block.unique()) < 2:
        raise CorpusError(
            f"{source}: {len(questions)} questions ({len(block.unique())} {unit}); a temperature is fitted on every other one "
            "and judged on the rest: give two or more"
        )
    most = context_length(reader.model.config)
    encoded = [encode(question, tokenizer, most, f"{source}, question {i}") for i, question in enumerate(questions, start=1)]
    sequences = [sequence for choices, _ in encoded for sequence in choices]
    with tqdm(total=len(sequences), desc=f"read {source}"[:40], unit="choice", disable=not progress) as bar:
        states = record_continuations(
            reader.model, reader.anatomy, sequences, reader.neurons, reader.device, bar.update, reader.readout
        )
    return ChoiceSample(source, questions, reader.reading(states), block, unit, sum(truncated for _, truncated in encoded))


def encode(
    question: Question, tokenizer: PreTrainedTokenizerBase, most: int | None, where: str = "question"
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Tokenize the prompt and each choice, as lm-eval splits them, and say whether a prompt lost its beginning.

    Prompt and choice are tokenized together, and what comes after as many tokens as the prompt has by itself is the choice.
    BOS is where the tokenizer puts it, and is the first to be lost. EOS, where the tokenizer ends texts with it, would stand
    between prompt and choice, and is left out.

    Args:
        question: to be answered.
        tokenizer: the model's.
        most: tokens that the model can read; the last of a choice is not read, only predicted.
        where: for the message.

    Raises:
        CorpusError: a choice has no token of its own, or more than the model can read.
    """
    _, after = surrounding_ids(tokenizer)

    def ids(text: str) -> list[int]:
        whole = list(tokenizer(text, verbose=False)["input_ids"])
        return whole[: len(whole) - len(after)]

    prompt, sequences, truncated = ids(question.prompt), [], False
    for choice, continuation in zip(question.choices, question.continuations, strict=True):
        own = ids(question.prompt + continuation)[len(prompt) :]
        if not own or (most is not None and len(own) > most):
            limit = "one or more" if most is None else f"1 to {most}"
            raise CorpusError(f"{where}: the choice {choice[:40]!r} has {len(own)} tokens; this model needs {limit}")
        context = prompt if most is None else prompt[-(most + 1 - len(own)) :]
        truncated |= len(context) < len(prompt)
        sequences.append((context, own))
    return sequences, truncated


def question_blocks(questions: Sequence[Question]) -> tuple[Tensor, Literal["questions", "passages"]]:
    """Number the resampling block of each question, ``[questions]``, and name the unit: passages, if any has several questions.

    A question without a passage is a block of its own.
    """
    number: dict[str | int, int] = {}
    keys = [question.passage or i for i, question in enumerate(questions)]
    block = torch.tensor([number.setdefault(key, len(number)) for key in keys])
    return block, "questions" if len(number) == len(questions) else "passages"


def fit_answer_temperature(log_likelihood: Tensor, gold: Tensor) -> float:
    """Find the temperature on answers that minimises their loss, between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`.

    The loss is convex in ``1/T`` and its slope is ``E_p[ℓ] − ℓ_gold``: at the minimum the right choices are as likely as the
    model expects of its answers.

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
    """Find the temperature, between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`, at which answers have a mean entropy, nats.

    Args:
        log_likelihood: of the choices, ``[questions, choices]``; −∞ where a question has fewer.
        entropy: between 0 and the mean logarithm of the numbers of choices.
    """
    return _crossing(lambda temperature: _entropy(log_likelihood / temperature) - entropy)


def _crossing(rising: Callable[[float], float]) -> float:
    """Find the temperature at which a function that rises with it crosses zero; an end of the range if it does not."""
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(math.exp(middle)) > 0 else (middle, high)
    return math.exp(middle)


def _entropy(log_likelihood: Tensor) -> float:
    """Average the entropy of answers, nats."""
    return float(torch.special.entr(log_likelihood.softmax(dim=-1)).sum(dim=-1).mean())


def compare_answers(sample: ChoiceSample, candidates: Sequence[AnswerCandidate]) -> ChoiceComparison:
    """Compute every metric of every candidate, and the differences that matter.

    Args:
        sample: the questions.
        candidates: the first is neutral.
    """
    blocks, gold = Blocks(sample.block), sample.gold
    # In characters, as lm-eval's acc_norm has it (its acc_bytes is in bytes).
    lengths = torch.tensor([float(len(choice)) for question in sample.questions for choice in question.choices])
    lengths = sample.padded(lengths, 1.0)
    estimates: list[Estimates] = []
    for candidate in candidates:
        right = (candidate.log_likelihood / lengths).argmax(dim=-1) == gold
        estimates.append(answer_metrics(candidate.log_likelihood, gold, blocks) | {"accuracy_normalised": blocks.mean(right)})
    rows = []
    for i, candidate in enumerate(candidates):
        confidence, prediction = candidate.log_likelihood.softmax(dim=-1).max(dim=-1)
        correct = prediction == gold
        rows.append(
            ComparedRow(
                name=candidate.name,
                kind=candidate.kind,
                steering=candidate.steering,
                values=candidate.values,
                metrics={name: estimate.interval for name, estimate in estimates[i].items()},
                minus=paired_differences(i, [(other.kind, other.steering) for other in candidates], estimates),
                reliability=reliability_bins(confidence, correct, blocks),
                coverage=accuracy_at_coverages(confidence, correct),
            )
        )
    return ChoiceComparison(
        source=sample.source,
        questions=len(sample.questions),
        truncated=sample.truncated,
        blocks=blocks.number,
        unit=sample.unit,
        rows=tuple(rows),
    )
