"""Short questions that a model answered in its own words, unsteered and steered, with five confidences in each answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from confsteer.bars import progress_bar
from confsteer.errors import CorpusError
from confsteer.evaluation.choice_sample import BlockUnit, question_blocks, read_choices
from confsteer.evaluation.comparison import RowKind
from confsteer.evaluation.confidences import (
    CONFIDENCES,
    OF_TOKENS,
    P_TRUE,
    TEMPERATURES,
    UNSTEERED,
    VERBALISED,
    ConfidenceName,
    PromptName,
    best_temperature,
    of_tokens,
    percentage,
    platt,
)
from confsteer.evaluation.reader import Reader, interventions_of
from confsteer.last_layer.intervention import Intervention
from confsteer.runtimes.continuations import Ends, Written, write
from confsteer.steering import Steering
from confsteer.text.prompts import ShortWording, Wording
from confsteer.text.questions import Question
from confsteer.text.short_questions import ShortQuestion
from confsteer.text.windows import context_length, surrounding_ids

ANSWER_TOKENS, WORKED_TOKENS, PERCENTAGE_TOKENS = 32, 256, 12
"""Most tokens of an answer: of words, of a number that is worked out, of a percentage."""


class WrittenWay(NamedTuple):
    """Answers to all questions under one steering, and the model's confidences in each."""

    name: str
    kind: RowKind
    steering: Steering | None
    texts: tuple[str, ...]
    """The answers as the model wrote them."""
    ended: Tensor
    """Whether each ended before it was cut off, ``[questions]`` bool."""
    empty: Tensor
    """Whether an answer has nothing to compare, ``[questions]`` bool."""
    correct: Tensor
    """``[questions]`` bool."""
    changed: Tensor
    """Whether each differs from the unsteered model's, ``[questions]`` bool."""
    mentioned: Tensor
    """Whether each has the words of an accepted answer among others, ``[questions]`` bool."""
    confidence: dict[ConfidenceName, Tensor]
    """Confidences, float64 ``[questions]`` each; NaN where the model gave none."""
    values: dict[ConfidenceName, tuple[float, ...]]
    """Fitted numbers; see `confsteer.evaluation.confidences.Fitted`. Empty if nothing was fitted."""


class WrittenSample(NamedTuple):
    """Short questions, and every way in which they were answered."""

    source: str
    wording: str
    questions: Sequence[ShortQuestion]
    prompts: dict[PromptName, str]
    """The first question as the model read it, and the prompts about its answer, by confidence."""
    block: Tensor
    """Resampling block of each question, ``[questions]``."""
    unit: BlockUnit
    truncated: int
    """Number of questions that lost their beginning, because they do not fit the model's context."""
    samples: int
    """Number of samples of each answer."""
    ways: list[WrittenWay]
    """Ways to answer: unsteered, the maps fitted to that, and each steering."""


class _Asking(NamedTuple):
    """The common parts of all questions to one model."""

    reader: Reader
    tokenizer: PreTrainedTokenizerBase
    steerings: Sequence[Steering]
    """Steerings, the unsteered model first."""
    interventions: Sequence[Intervention]
    chat: bool
    source: str
    progress: bool

    def write(self, doing: str, prompts: Sequence[str], ends: Sequence[Ends], **how: Any) -> tuple[list[list[Written]], int]:
        """Continue prompts. Return continuations by prompt and steering, and how many prompts lost their beginning."""
        most, encoded = context_length(self.reader.model.config), []
        # Add no special tokens after a chat template, which writes them. Drop an end that the tokenizer puts after texts: it
        # would end the prompt.
        after = 0 if self.chat else len(surrounding_ids(self.tokenizer)[1])
        for prompt in prompts:
            text = prompt if self.chat else prompt.rstrip()
            ids = self.tokenizer(text, add_special_tokens=not self.chat, verbose=False)["input_ids"]
            encoded.append(list(ids[: len(ids) - after]))
        if most is not None:
            # Leave at least half of the context for the prompt.
            ends = [one._replace(max_new_tokens=min(one.max_new_tokens, most // 2)) for one in ends]
        room = 0 if most is None else most - max(one.max_new_tokens for one in ends)
        kept = [ids[-room:] for ids in encoded]
        with progress_bar(f"{doing} {self.source}", len(kept), "question", show=self.progress) as bar:
            found = write(
                self.reader.model,
                self.tokenizer,
                self.reader.profile,
                [*zip(kept, ends, strict=True)],
                self.steerings,
                on_prompts=bar.update,
                **how,
            )
        return found, sum(len(few) < len(ids) for few, ids in zip(kept, encoded, strict=True))


def write_sample(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ShortQuestion],
    steerings: Sequence[Steering],
    *,
    source: str,
    wording: ShortWording,
    samples: int,
    progress: bool = False,
) -> WrittenSample:
    """Let a model answer questions, unsteered and with each steering, and find its confidences in each answer.

    Args:
        reader: of the model.
        tokenizer: the model's.
        questions: to be answered.
        steerings: steerings. All must be for every position.
        source: where the questions are from, for messages.
        wording: their wording.
        samples: number of samples of each answer, for self-consistency.
        progress: whether to show progress bars.

    Raises:
        CorpusError: there are too few questions, or the wording does not fit one.
        SteeringError: see `confsteer.evaluation.reader.interventions_of`.
    """
    block, unit = question_blocks(questions)
    if len(block.unique()) < 2:
        raise CorpusError(
            f"{source}: {len(questions)} questions ({len(block.unique())} {unit}); what is fitted is fitted on every other one "
            "and judged on the rest: give two or more"
        )
    resolved, interventions = interventions_of(steerings, reader.profile)
    neutral = Intervention.neutral(reader.readout.n_neurons)
    asking = _Asking(reader, tokenizer, [Steering(), *resolved], [neutral, *interventions], wording.chat, source, progress)
    prompts = [wording.ask(one, tokenizer, f"{source}, question {i}") for i, one in enumerate(questions, start=1)]
    ends = [_ends(one, wording.chat) for one in questions]
    written, truncated = asking.write("answer", prompts, ends, samples=samples, temperatures=TEMPERATURES)
    about, pair = _about_answers(questions, written)
    p_true, p_true_asked = _p_true(asking, about)
    verbalised, verbalised_asked = _verbalised(asking, about)

    # Join the confidences in each answer under the steering that it was written with.
    names, ways = ["neutral", *map(str, steerings)], []
    unsteered = [question.key(ones[0].text) for question, ones in zip(questions, written, strict=True)]
    for i, (name, steering) in enumerate(zip(names, asking.steerings, strict=True)):
        way = _way(name, steering, questions, [of_prompt[i] for of_prompt in written], unsteered)
        way.confidence.update({"p_true": p_true[i][pair[:, i]], "verbalised": verbalised[i][pair[:, i]]})
        ways.append(way if i else way._replace(kind="neutral"))
    ways.insert(1, fitted(ways[0], [of_prompt[0].log_probability for of_prompt in written], block))
    asked: dict[PromptName, str] = {"answer": prompts[0], "p_true": p_true_asked, "verbalised": verbalised_asked}
    return WrittenSample(source, wording.title, questions, asked, block, unit, truncated, samples, ways)


def _way(
    name: str, steering: Steering, questions: Sequence[ShortQuestion], answers: Sequence[Written], unsteered: Sequence[str]
) -> WrittenWay:
    """Judge the answers under a steering, with the confidences that follow from their tokens and samples."""
    keys = [question.key(one.text) for question, one in zip(questions, answers, strict=True)]
    agree = [
        [question.key(text) == key for text in one.samples] for question, one, key in zip(questions, answers, keys, strict=True)
    ]
    confidence = {key: of[UNSTEERED] for key, of in of_tokens([one.log_probability for one in answers]).items()}
    confidence["self_consistency"] = torch.tensor(agree, dtype=torch.float64).mean(dim=1)
    return WrittenWay(
        name=name,
        kind="steering",
        steering=steering,
        texts=tuple(one.text for one in answers),
        ended=torch.tensor([one.ended for one in answers]),
        empty=torch.tensor([not key for key in keys]),
        correct=torch.tensor([question.accepts(one.text) for question, one in zip(questions, answers, strict=True)]),
        changed=torch.tensor([key != before for key, before in zip(keys, unsteered, strict=True)]),
        mentioned=torch.tensor([question.is_mentioned_in(one.text) for question, one in zip(questions, answers, strict=True)]),
        confidence=confidence,
        values={},
    )


def fitted(neutral: WrittenWay, log_probability: Sequence[Tensor], block: Tensor) -> WrittenWay:
    """Fit the baselines of steerings to the unsteered model's confidences. The answers stay; the confidences in them change.

    Confidences from tokens get a temperature on the tokens' logits. The others get a slope and a constant on their own logit.

    Args:
        neutral: the unsteered model.
        log_probability: log-probabilities of its answers' tokens, ``[temperatures, tokens]`` each.
        block: of each question, ``[questions]``.
    """
    at_temperatures = of_tokens(log_probability)
    found = {
        name: best_temperature(at_temperatures[name], neutral.correct, block)
        if name in OF_TOKENS
        else platt(neutral.confidence[name], neutral.correct, block)
        for name in CONFIDENCES
    }
    return neutral._replace(
        name="fitted",
        kind="temperature",
        steering=None,
        confidence={name: one.confidence for name, one in found.items()},
        values={name: one.values for name, one in found.items()},
    )


def _ends(question: ShortQuestion, chat: bool) -> Ends:
    """Choose the end of an answer: for words, that of the line. For a number, outside of a chat, that of the paragraph."""
    number = question.kind == "number"
    paragraph = () if chat else ("\n\n",)
    return Ends(WORKED_TOKENS if number else ANSWER_TOKENS, question.until or (paragraph if number else ("\n",)))


def _about_answers(questions: Sequence[ShortQuestion], written: Sequence[Sequence[Written]]) -> tuple[list[Question], Tensor]:
    """Make a question about each answer, only once if several steerings give the same answer.

    Returns:
        The questions, and the index of each answer's question, ``[questions, steerings]``.
    """
    about: dict[tuple[int, str], int] = {}
    pair = [
        [about.setdefault((i, question.key(one.text) if question.kind == "number" else one.text), len(about)) for one in ways]
        for i, (question, ways) in enumerate(zip(questions, written, strict=True))
    ]
    asked = [
        Question(questions[i].question, ("True", "False"), 0, questions[i].passage, record={"proposed": proposed})
        for i, proposed in about
    ]
    return asked, torch.tensor(pair)


def _p_true(asking: _Asking, about: Sequence[Question]) -> tuple[list[Tensor], str]:
    """Find P(True) of each answer under each steering, ``[answers]`` each, and the first prompt."""
    wording = Wording("letters", P_TRUE, asking.chat)
    how = {"source": asking.source, "wording": wording, "progress": asking.progress}
    sample = read_choices(asking.reader, asking.tokenizer, about, **how)  # type: ignore[arg-type]
    scores = sample.log_likelihoods(asking.interventions)
    return [one.softmax(dim=-1)[:, 0] for one in scores], sample.asked[0].contexts[0]


def _verbalised(asking: _Asking, about: Sequence[Question]) -> tuple[list[Tensor], str]:
    """Let the model write a percentage for each answer under each steering, ``[answers]`` each. Return the first prompt too."""
    wording = Wording("text", VERBALISED, asking.chat)
    prompts = [wording.ask(one, asking.tokenizer, asking.source).contexts[0] for one in about]
    written, _ = asking.write("rate", prompts, [Ends(PERCENTAGE_TOKENS, ("\n",))] * len(prompts))
    by_way = zip(*written, strict=True)
    return [torch.tensor([percentage(one.text) for one in way], dtype=torch.float64) for way in by_way], prompts[0]
