"""Questions whose answer is a few words or a number, and the test whether a model's own words answer them.

| shape | fields |
|---|---|
| plain | ``question``, and ``answer`` or ``answers``: a string or a list of accepted strings |
| TriviaQA | ``question``, ``answer`` with ``value`` and ``aliases`` |
| NaturalQuestions-open | ``question``, a list ``answer`` |
| SQuAD | ``question``, ``context``, ``answers`` with a list ``text`` |
| GSM8K | ``question``, and an ``answer`` that ends in ``#### 42`` |
| lm-eval's logged samples | ``doc``, ``arguments``, ``target`` of a task that generates: asked as they were there |

Words are right if they are an accepted answer after SQuAD's normalisation; see `normalised`. If the answer is a number, the last
number that the model wrote counts; see `final_number`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from confsteer.errors import CorpusError
from confsteer.text.questions import QuestionSource, Scalar, record_id
from confsteer.text.sources import read_records
from confsteer.text.windows import json_kind

AnswerKind = Literal["words", "number"]
FINAL = "####"
"""Mark before the final number, as in GSM8K."""
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
PARTS = ("question", "answer", "answers", "context", "passage", "id")
"""Fields that are part of a question. The others are the record's own."""
CHOICES = {"choices", "options", "endings"}
"""Fields of multiple-choice questions."""


class ShortQuestion(NamedTuple):
    """A question with one or more accepted answers."""

    question: str
    answers: tuple[str, ...]
    """Accepted answers: one or more."""
    kind: AnswerKind = "words"
    passage: str = ""
    """Text that the question is about. Empty if there is none."""
    worked: str = ""
    """Answer to show in an example. Empty if that is the first accepted one."""
    context: str = ""
    """Whole prompt, if lm-eval asked and logged the question."""
    until: tuple[str, ...] = ()
    """Strings that ended an answer in lm-eval."""
    id: str = ""
    record: Mapping[str, Scalar] = MappingProxyType({})
    """Other fields of its record that are strings, numbers or truth values."""

    def key(self, text: str) -> str:
        """Reduce an answer to the part that is compared. It is empty if there is nothing to compare."""
        return normalised(text) if self.kind == "words" else final_number(text)

    def accepts(self, text: str) -> bool:
        """Whether an answer is right."""
        key = self.key(text)
        return bool(key) and key in {self.key(answer) for answer in self.answers}

    def is_mentioned_in(self, text: str) -> bool:
        """Say whether an answer has the words of an accepted one among others, as in a sentence, which does not count."""
        if self.kind != "words" or self.accepts(text):
            return False
        words = f" {self.key(text)} "
        return any(f" {key} " in words for answer in self.answers if (key := self.key(answer)))


class ShortQuestionSource(QuestionSource):
    """Source of short questions."""

    def read(self) -> list[ShortQuestion]:  # type: ignore[override]
        """Read the questions of this source.

        Raises:
            CorpusError: see `read_short_questions`, or there is no such dataset.
        """
        return read_short_questions([self.path]) if self.path is not None else _all(self._records())

    def looks_like_questions(self) -> bool:
        """Whether the first record has the fields of a short question."""
        first = next(iter(self._records()), ("", None))[1]
        if not isinstance(first, dict) or "question" not in first:
            return False
        return bool({"answer", "answers"} & first.keys()) and not CHOICES & first.keys()


def normalised(text: str) -> str:
    """Normalise as SQuAD's evaluation does: lower case, no punctuation, no articles, single spaces.

    A step that would leave nothing is skipped: the answers "A" and "+" stay themselves.
    """
    lowered = text.lower()
    bare = "".join(letter for letter in lowered if letter not in string.punctuation)
    without = re.sub(r"\b(a|an|the)\b", " ", bare)
    return next((words for form in (without, bare, lowered) if (words := " ".join(form.split()))), "")


def final_number(text: str) -> str:
    """Find the number after the last ``####``, or else the last number, in a fixed notation. Empty if there is no number."""
    _, mark, after = text.rpartition(FINAL)
    found = NUMBER.findall(after)[:1] if mark else []
    number = next(iter(found or reversed(NUMBER.findall(text))), "")
    written = f"{Decimal(number.replace(',', '')):f}" if number else ""
    return written.rstrip("0").rstrip(".") if "." in written else written


def read_short_questions(paths: Sequence[Path]) -> list[ShortQuestion]:
    """Read short questions from files and folders: JSON lines or a JSON list, in the shapes that this module lists.

    Args:
        paths: see `confsteer.text.sources.read_texts`.

    Raises:
        CorpusError: a file is missing or not JSON, or a record is not a short question. The message says which and why.
    """
    return _all(read_records(paths, "questions"))


def _all(records: Iterable[tuple[str, Any]]) -> list[ShortQuestion]:
    """Make questions from records, each with its place in a file. Leave out repeats: each filter of an lm-eval task logs all."""
    found = [_question(record, where) for where, record in records]
    first = {question.context: i for i, question in reversed([*enumerate(found)]) if question.context}
    return [question for i, question in enumerate(found) if first.get(question.context, i) == i]


def _question(record: Any, where: str) -> ShortQuestion:
    if not isinstance(record, dict):
        raise CorpusError(f"{where} is {json_kind(record)}, not an object with 'question' and 'answer'")
    if {"doc", "arguments", "target"} <= record.keys():
        return _logged(record, where)
    if with_choices := CHOICES & record.keys():
        raise CorpusError(f"{where} has {with_choices.pop()!r}: it is a multiple-choice question, which --choices asks")
    question, passage = record.get("question"), record.get("passage", record.get("context"))
    if not isinstance(question, str) or not question.strip():
        raise CorpusError(f"{where} has no string 'question'; it has {', '.join(map(repr, record)) or 'no fields'}")
    if not isinstance(passage, str | None):
        raise CorpusError(f"{where}: the passage is {json_kind(passage)}, not a string")
    answers = _accepted(record.get("answers", record.get("answer")), where)
    own = {name: value for name, value in record.items() if isinstance(value, Scalar) and name not in PARTS}
    found = ShortQuestion(question.strip(), answers, passage=(passage or "").strip(), id=record_id(record, where), record=own)
    return _checked(found, where)


def _checked(question: ShortQuestion, where: str) -> ShortQuestion:
    """Take the final number of an answer that marks one, and check that there is an accepted answer."""
    if all(FINAL in answer for answer in question.answers):
        worked = question.answers[0]
        question = question._replace(kind="number", answers=tuple(map(final_number, question.answers)), worked=worked)
    if not all(question.key(answer) for answer in question.answers):
        raise CorpusError(f"{where}: an accepted answer has nothing to compare (no letters, or no number after {FINAL!r})")
    return question


def _accepted(answer: Any, where: str) -> tuple[str, ...]:
    """List the accepted answers, whatever their shape."""
    if isinstance(answer, dict):
        # Read SQuAD's from `text`, and TriviaQA's from one value and its aliases.
        answer = answer.get("text", [answer.get("value"), *(answer.get("aliases") or [])])
    given = answer if isinstance(answer, list) else [answer]
    texts = [str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in given]
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise CorpusError(
            f"{where} has no accepted answer: give 'answer' or 'answers', a string or a list of strings; leave out questions "
            "that have none"
        )
    return tuple(dict.fromkeys(one.strip() for one in texts))


def _logged(record: dict[str, Any], where: str) -> ShortQuestion:
    """Read a question of a generating task as lm-eval asked it, from a line of the files that ``--log_samples`` writes.

    The accepted answers are those of the task's own record. Only if it has none, the target is accepted.
    """
    arguments, doc = record["arguments"], record["doc"] if isinstance(record["doc"], dict) else {}
    requests = [*arguments.values()] if isinstance(arguments, dict) else arguments
    first = requests[0] if isinstance(requests, list) and requests else None
    pair = [*first.values()] if isinstance(first, dict) else first
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], dict)):
        raise CorpusError(f"{where}: lm-eval did not ask the model to write here: no prompt and settings in 'arguments'")
    until = pair[1].get("until") or ()
    question = ShortQuestion(
        str(doc.get("question", pair[0])).strip(),
        _accepted(doc.get("answers", doc.get("answer", record["target"])), where),
        context=pair[0],
        until=(until,) if isinstance(until, str) else tuple(one for one in until if isinstance(one, str) and one),
        id=record_id(record, where),
        record={name: value for name, value in doc.items() if isinstance(value, Scalar) and name not in PARTS},
    )
    return _checked(question, where)
