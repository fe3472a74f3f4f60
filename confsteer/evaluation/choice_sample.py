"""Multiple-choice questions that a model read once, for any number of steerings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from confsteer.bars import progress_bar
from confsteer.errors import CorpusError
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.last_layer.text_states import OnTokens, TextStates, unnoticed
from confsteer.model.states import record_continuations
from confsteer.text.prompts import AS_TEXT, Asked, Wording
from confsteer.text.questions import Question, Scalar
from confsteer.text.short_questions import ShortQuestion
from confsteer.text.windows import context_length, surrounding_ids

BlockUnit = Literal["questions", "passages"]


class ChoiceSample(NamedTuple):
    """Questions, and their choices as the last layer saw them."""

    source: str
    questions: Sequence[Question]
    asked: Sequence[Asked]
    """The questions in the words that the model read."""
    reading: TextStates
    """States at the choices' tokens. ``window`` counts through the choices of all questions."""
    block: Tensor
    """Resampling block of each question, ``[questions]``; see `question_blocks`."""
    unit: BlockUnit
    truncated: int
    """Number of questions that lost their beginning, because they do not fit the model's context with all choices."""

    @property
    def gold(self) -> Tensor:
        """Index of the right choice, ``[questions]``."""
        return torch.tensor([question.answer for question in self.questions])

    @property
    def inside(self) -> Tensor:
        """Mark the choices that a question has, ``[questions, most choices]`` bool."""
        return self.padded(torch.ones(self._choices, dtype=torch.bool), False)

    @property
    def characters(self) -> Tensor:
        """Count the characters of each choice's text, without white space around it, padded with 1.

        lm-eval's ``acc_norm`` counts characters too (its ``acc_bytes`` counts bytes).
        """
        lengths = [float(len(text.strip())) for asked in self.asked for text in asked.continuations]
        return self.padded(torch.tensor(lengths, dtype=torch.float64), 1.0).clamp_min(1)

    @property
    def tokens(self) -> Tensor:
        """Count the tokens of each choice, ``[questions, most choices]``, padded with 1."""
        counts = torch.bincount(self.reading.states.window.cpu(), minlength=self._choices)
        return self.padded(counts.double(), 1.0)

    @property
    def _choices(self) -> int:
        return sum(len(question.choices) for question in self.questions)

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
            Log-likelihoods in nats, float64 ``[questions, most choices]`` each; −∞ where a question has fewer choices.
        """
        reading = self.reading
        predictions = reading.predict([reading.coordinates(one) for one in interventions], on_tokens=on_tokens)
        return [self.summed(-one.scores.nll) for one in predictions]

    def summed(self, log_probability: Tensor) -> Tensor:
        """Add up the log-probabilities of all tokens ``[tokens]`` by choice; see `log_likelihoods`."""
        zeros = torch.zeros(self._choices, dtype=torch.float64)
        return self.padded(zeros.index_add(0, self.reading.states.window.cpu(), log_probability.double().cpu()), -math.inf)

    def at(self, rows: Tensor) -> ChoiceSample:
        """Take some of the questions, by indices in rising order."""
        chosen = torch.zeros(len(self.questions), dtype=torch.bool)
        chosen[rows] = True
        of_question = torch.tensor([len(question.choices) for question in self.questions])
        kept = chosen.repeat_interleave(of_question)
        window = self.reading.states.window.cpu()
        reading = self.reading.at(kept[window].nonzero()[:, 0].to(self.reading.states.targets.device))
        # Number the choices that are left.
        renumbered = (kept.cumsum(0) - 1)[reading.states.window.cpu()]
        reading.states = reading.states._replace(window=renumbered.to(reading.states.window.device))
        some = rows.tolist()
        return self._replace(
            questions=[self.questions[i] for i in some],
            asked=[self.asked[i] for i in some],
            reading=reading,
            block=self.block[rows],
        )

    def cross_fitted(self, fit: Callable[[Tensor], Tensor], use: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Fit on every other block and use the fit on the rest, and the other way round. No fit judges a question that it saw.

        Args:
            fit: function from a mask of questions, ``[questions]``, to the numbers fitted on them.
            use: function from the numbers and another mask to the scores of those questions, ``[some questions, most choices]``.

        Returns:
            Scores ``[questions, most choices]``, and the numbers of each fold, ``[folds, numbers]``.
        """
        _, order = self.block.unique(return_inverse=True)
        scores = torch.full(self.inside.shape, -math.inf, dtype=torch.float64)
        fitted = []
        for side in (0, 1):
            fitted.append(fit(order % 2 != side))
            scores[order % 2 == side] = use(fitted[-1], order % 2 == side)
        return scores, torch.stack(fitted)


def read_choices(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    source: str = "questions",
    wording: Wording = AS_TEXT,
    progress: bool = False,
) -> ChoiceSample:
    """Run the model over questions once, and keep the states that decide each choice's likelihood: ``d_model`` numbers a token.

    Args:
        reader: of the model.
        tokenizer: the model's.
        questions: to be answered.
        source: where they are from, for messages.
        wording: words to put them in.
        progress: whether to show a progress bar.

    Raises:
        CorpusError: there are too few questions, or the wording does not fit one. Or a choice has no token of its own, or more
            than the model can read.
    """
    block, unit = question_blocks(questions)
    if len(block.unique()) < 2:
        raise CorpusError(
            f"{source}: {len(questions)} questions ({len(block.unique())} {unit}); a temperature is fitted on every other one "
            "and judged on the rest: give two or more"
        )
    most = context_length(reader.model.config)
    asked = [wording.ask(one, tokenizer, f"{source}, question {i}") for i, one in enumerate(questions, start=1)]
    encoded = [encode(one, tokenizer, most, f"{source}, question {i}") for i, one in enumerate(asked, start=1)]
    sequences = [sequence for choices, _ in encoded for sequence in choices]
    with progress_bar(f"read {source}", len(sequences), "choice", show=progress) as bar:
        states = record_continuations(
            reader.model, reader.anatomy, sequences, reader.neurons, reader.device, bar.update, reader.readout
        )
    cut = sum(truncated for _, truncated in encoded)
    return ChoiceSample(source, questions, asked, reader.reading(states), block, unit, cut)


def encode(
    asked: Asked, tokenizer: PreTrainedTokenizerBase, most: int | None, where: str = "question"
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Tokenize the prompt and each choice, split as in lm-eval, and tell whether a prompt lost its beginning.

    Prompt and choice are tokenized together. The choice is what follows as many tokens as the prompt alone has. Spaces at the
    end of a prompt belong to the choice, unless a chat template put them there. BOS is where the tokenizer puts it, and is the
    first to be cut off. A tokenizer may end texts with EOS. It would stand between prompt and choice, so it is left out.

    Args:
        asked: the question in words.
        tokenizer: the model's.
        most: most tokens that the model can read. The last of a choice is only predicted, not read.
        where: place of the question, for the message.

    Raises:
        CorpusError: a choice has no token of its own, or more than the model can read.
    """
    after = [] if asked.rendered else surrounding_ids(tokenizer)[1]

    def ids(text: str) -> list[int]:
        whole = list(tokenizer(text, add_special_tokens=not asked.rendered, verbose=False)["input_ids"])
        return whole[: len(whole) - len(after)]

    prompts: dict[str, list[int]] = {}
    sequences, truncated = [], False
    for before, choice in zip(asked.contexts, asked.continuations, strict=True):
        context = before if asked.rendered else before.rstrip()
        if context not in prompts:
            prompts[context] = ids(context)
        prompt = prompts[context]
        own = ids(before + choice)[len(prompt) :]
        if not own or (most is not None and len(own) > most):
            limit = "one or more" if most is None else f"1 to {most}"
            raise CorpusError(f"{where}: the choice {choice.strip()[:40]!r} has {len(own)} tokens; this model needs {limit}")
        kept = prompt if most is None else prompt[-(most + 1 - len(own)) :]
        truncated |= len(kept) < len(prompt)
        sequences.append((kept, own))
    return sequences, truncated


def question_blocks(questions: Sequence[Question | ShortQuestion]) -> tuple[Tensor, BlockUnit]:
    """Number the resampling block of each question, ``[questions]``, and name the unit: passages, if one has several questions.

    A question without a passage is a block of its own.
    """
    number: dict[str | int, int] = {}
    keys = [question.passage or i for i, question in enumerate(questions)]
    block = torch.tensor([number.setdefault(key, len(number)) for key in keys])
    return block, "questions" if len(number) == len(questions) else "passages"


def with_own_fields(record: dict[str, Any], own: Mapping[str, Scalar]) -> dict[str, Any]:
    """Add the fields of a question's own record to what is written of it. A name that is taken gets ``record_`` before it."""
    return record | {f"record_{name}" if name in record else name: value for name, value in own.items()}
