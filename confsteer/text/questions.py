"""Multiple-choice questions from JSON files, and the words they are put in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from confsteer.errors import CorpusError
from confsteer.text.sources import read_records
from confsteer.text.windows import json_kind

FIELDS = {
    "question": ("question",),
    "choices": ("choices", "options"),
    "answer": ("answer", "label"),
    "passage": ("passage", "context"),
}
"""Names that a record may give each part: the first that it has and that is not null."""


class Question(NamedTuple):
    """A question with one right answer."""

    question: str
    choices: tuple[str, ...]
    """Two or more."""
    answer: int
    """Index of the right choice."""
    passage: str = ""
    """Text that the question is about; empty if it stands alone."""

    @property
    def prompt(self) -> str:
        """Put what the model reads before a choice in the words of lm-eval's ARC and SciQ."""
        passage = f"{self.passage}\n" if self.passage else ""
        return f"{passage}Question: {self.question}\nAnswer:"

    @property
    def continuations(self) -> tuple[str, ...]:
        """Put what each choice adds to the prompt."""
        return tuple(f" {choice}" for choice in self.choices)


def read_questions(paths: Sequence[Path]) -> list[Question]:
    """Read questions of JSON files and folders: JSON lines, or a JSON list.

    A record is ``{"question": "…", "choices": ["…", …], "answer": …}``, the answer being the text of a choice, its letter (A
    for the first) or its index (0 for the first), and may have a ``"passage"``. The names that `FIELDS` lists do as well, so
    that AGIEval's files are read as they are. White space around texts is left out.

    Letters that every choice begins with, as in ``(A)``, are left out too: the prompt does not list the choices, so that a
    letter would stand for nothing in it. lm-eval's ARC has its choices without them as well.

    Args:
        paths: see `confsteer.text.sources.read_texts`.

    Raises:
        CorpusError: a file is missing or no JSON, or a record is not a question; it says which and why.
    """
    return [_question(record, where) for where, record in read_records(paths, "questions")]


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise CorpusError(f"{where} is {json_kind(record)}, not an object with 'question', 'choices' and 'answer'")
    question, choices, answer = (_part(record, name, where) for name in ("question", "choices", "answer"))
    if not isinstance(choices, list):
        raise CorpusError(f"{where}: the choices are {json_kind(choices)}, not a list of strings")
    if len(choices) < 2:
        raise CorpusError(f"{where}: {len(choices)} choices; a question needs two or more")
    texts = [_text(choice, f"choice {number}", where) for number, choice in enumerate(choices, start=1)]
    lettered = [
        re.fullmatch(rf"\({letter}\)\s*(.+)", text, re.DOTALL) for letter, text in zip(ascii_uppercase, texts, strict=False)
    ]
    if len(lettered) == len(texts) and all(lettered):
        texts = [match[1] for match in lettered if match]
    passage = next((record[name] for name in FIELDS["passage"] if record.get(name)), None)
    return Question(
        _text(question, "the question", where),
        tuple(texts),
        _answer(answer, texts, where),
        "" if passage is None else _text(passage, "the passage", where, empty=True),
    )


def _part(record: dict[str, Any], part: str, where: str) -> Any:
    for name in FIELDS[part]:
        if record.get(name) is not None:
            return record[name]
    names = " or ".join(map(repr, FIELDS[part]))
    raise CorpusError(f"{where} has no {names}; it has {', '.join(map(repr, record)) or 'no fields'}")


def _text(value: Any, what: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {what} is {json_kind(value)}, not a string")
    if not (text := value.strip()) and not empty:
        raise CorpusError(f"{where}: {what} is empty")
    return text


def _answer(answer: Any, choices: Sequence[str], where: str) -> int:
    """Find the choice that is meant, by index."""
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, str):
        meant = {i for i, choice in enumerate(choices) if choice == answer.strip()}
        meant |= {i for i, letter in enumerate(letters) if letter == answer.strip()}
    else:
        meant = {answer} if type(answer) is int and 0 <= answer < len(choices) else set()
    if not meant:
        raise CorpusError(
            f"{where}: the answer {answer!r} is not among the choices; give the text of one, its letter (A to {letters[-1]}) or "
            f"its index (0 to {len(choices) - 1})"
        )
    if len(meant) > 1:
        numbers = " and ".join(str(i + 1) for i in sorted(meant))
        raise CorpusError(f"{where}: the answer {answer!r} may mean choice {numbers}; give its index (0 to {len(choices) - 1})")
    return meant.pop()
