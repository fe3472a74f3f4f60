"""Multiple-choice questions from JSON and CSV files and from datasets, in the shapes of benchmarks."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, model_validator

from confsteer.errors import CorpusError
from confsteer.text.question_shapes import FIELDS, PLAIN, Kind, shape_of
from confsteer.text.sources import DEFAULT_SPLIT, JSON_SUFFIXES, dataset_title, read_dataset_records, read_records
from confsteer.text.windows import json_kind

Scalar = str | int | float | bool


class Question(NamedTuple):
    """A question with one right answer."""

    question: str
    choices: tuple[str, ...]
    """Texts of the choices: two or more."""
    answer: int
    """Index of the right choice."""
    passage: str = ""
    """Text that the question is about. Empty if there is none."""
    kind: Kind = "question"
    """Use of the choices: they answer it, continue it, or fill its ``_``. Or it is asked as before, see `contexts`."""
    contexts: tuple[str, ...] = ()
    """Text before each choice, if lm-eval asked and logged the question. The choices are then the texts that it scored."""
    id: str = ""
    record: Mapping[str, Scalar] = MappingProxyType({})
    """Other fields of its record that are strings, numbers or truth values."""


class QuestionSource(BaseModel):
    """Source of questions, in the words of the command line's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = None
    """File or folder, see `read_questions`."""
    dataset: str | None = None
    """Hub id or local folder of a dataset, in place of a file. It is streamed."""
    config: str | None = None
    split: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _is_one_thing(self) -> QuestionSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("questions are a file (path) or a dataset: give one of them")
        if not self.dataset and (self.config or self.split):
            raise ValueError("config and split go with a dataset")
        return self

    @property
    def title(self) -> str:
        """Name for reports."""
        if self.path is not None:
            return self.path.name or str(self.path)
        assert self.dataset is not None
        return dataset_title(self.dataset, self.config, self.split)

    def read(self) -> list[Question]:
        """Read the questions of this source.

        Raises:
            CorpusError: see `read_questions`, or there is no such dataset.
        """
        if self.path is not None:
            return read_questions([self.path])
        return _questions(self._records())

    def looks_like_questions(self) -> bool:
        """Whether the first record has the fields of a question."""
        first = next(iter(self._records()), ("", None))[1]
        return isinstance(first, dict) and shape_of(first) is not None

    def _records(self) -> Iterable[tuple[str, Any]]:
        return read_dataset_records(self.dataset or "", config=self.config, split=self.split or DEFAULT_SPLIT)


def read_questions(paths: Sequence[Path]) -> list[Question]:
    """Read questions from files and folders: JSON lines, a JSON list, or MMLU's CSV.

    A record is ``{"question": "…", "choices": ["…", …], "answer": …}``, and may have a ``"passage"``. The answer is the text of
    a choice, its letter (A for the first) or its index (0 for the first). The names in `confsteer.text.question_shapes.FIELDS`
    are read too, so AGIEval's files need no change. So are the shapes in `confsteer.text.question_shapes.SHAPES`. White space
    around texts is left out.

    Letters that every choice begins with, as in ``(A)``, are left out too. The prompt decides whether choices have letters. The
    choices of lm-eval's ARC have none either.

    Args:
        paths: see `confsteer.text.sources.read_texts`.

    Raises:
        CorpusError: a file is missing or not JSON, or a record is not a question. The message says which and why.
    """
    found = read_records(paths, "questions", (*JSON_SUFFIXES, ".csv"))
    return _questions((place, record) for where, content in found for place, record in _rows(content, where))


def _rows(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the record itself, or each row of a CSV file's text as an object."""
    if not (isinstance(content, str) and where.lower().removesuffix(".gz").endswith(".csv")):
        yield where, content
        return
    # Take the subject from the name: MMLU's files are called anatomy_test.csv.
    subject = re.sub(r"(_test|_val|_dev)?\.csv(\.gz)?$", "", Path(where).name)
    header: list[str] | None = None
    for number, row in enumerate(csv.reader(io.StringIO(content)), start=1):
        if number == 1 and any(cell.strip().lower() == "question" for cell in row):
            header = [cell.strip() for cell in row]
            continue
        names = header or ["question", *ascii_uppercase[: len(row) - 2], "answer"]
        if not row:
            continue
        if len(row) < 4 or len(row) != len(names):
            raise CorpusError(
                f"{where}, row {number} has {len(row)} cells: a question is a row of its text, two choices or more and the "
                "letter of the right one, as in MMLU's files"
            )
        cells = dict(zip(names, row, strict=True))
        choices = [cells.pop(letter) for letter in ascii_uppercase if letter in cells]
        yield f"{where}, row {number}", {"subject": subject, **cells, "choices": choices}


def _questions(records: Iterable[tuple[str, Any]]) -> list[Question]:
    """Make questions from records, each with its place in a file.

    Repeated logged questions are left out, because each filter of an lm-eval task logs all of them.
    """
    known = [*records]
    by_letter = _answers_are_letters([record for _, record in known])
    seen: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    found = []
    for where, record in known:
        question = _question(record, where, by_letter)
        key = (question.contexts, question.choices)
        if question.kind != "served" or key not in seen:
            found.append(question)
        seen.add(key)
    return found


def _answers_are_letters(records: Sequence[Any]) -> bool:
    """Whether answers are letters: some are letters that are not choices, and none is a choice that is not a letter.

    Then a letter that is also the text of another choice is read as a letter, as in questions about grades A to D.
    """
    letters = texts = False
    for record in records:
        if not isinstance(record, dict) or shape_of(record) != PLAIN:
            continue
        answer, choices = (next((record[n] for n in FIELDS[p] if record.get(n) is not None), None) for p in ("answer", "choices"))
        if not isinstance(answer, str) or not isinstance(choices, list):
            continue
        is_text, is_letter = answer.strip() in choices, answer.strip() in [*ascii_uppercase[: len(choices)]]
        letters, texts = letters or (is_letter and not is_text), texts or (is_text and not is_letter)
    return letters and not texts


def _question(record: Any, where: str, by_letter: bool) -> Question:
    if not isinstance(record, dict):
        raise CorpusError(f"{where} is {json_kind(record)}, not an object with 'question', 'choices' and 'answer'")
    shape = shape_of(record) or PLAIN
    plain = shape.read(record, where)
    question, choices, answer = (_part(plain, name, where) for name in ("question", "choices", "answer"))
    if not isinstance(choices, list):
        raise CorpusError(f"{where}: the choices are {json_kind(choices)}, not a list of strings")
    if len(choices) < 2:
        raise CorpusError(f"{where}: {len(choices)} choices; a question needs two or more")
    kind: Kind = shape.kind
    texts = [_text(choice, f"choice {number}", where, strip=kind != "served") for number, choice in enumerate(choices, start=1)]
    passage = next((plain[name] for name in FIELDS["passage"] if plain.get(name)), None)
    # Take the record of the task's dataset for a logged question.
    own = record["doc"] if kind == "served" and isinstance(record["doc"], dict) else record
    return Question(
        _text(question, "the question", where),
        tuple(_without_letters(texts)),
        _answer(answer, texts, where, by_letter) if kind != "served" else int(answer),
        "" if passage is None else _text(passage, "the passage", where, empty=True),
        kind,
        tuple(plain["contexts"]) if kind == "served" else (),
        record_id(record, where),
        {name: value for name, value in own.items() if isinstance(value, Scalar) and name not in shape.fields},
    )


def _without_letters(texts: list[str]) -> list[str]:
    lettered = [
        re.fullmatch(rf"\({letter}\)\s*(.+)", text, re.DOTALL) for letter, text in zip(ascii_uppercase, texts, strict=False)
    ]
    return [match[1] for match in lettered if match] if len(lettered) == len(texts) and all(lettered) else texts


def record_id(record: dict[str, Any], where: str) -> str:
    """Take the record's own id, or the last number in the name of its place."""
    for name in ("id", "question_id", "doc_id", "ind", "idx"):
        if isinstance(record.get(name), str | int) and record[name] != "":
            return str(record[name])
    return where.rpartition(" ")[2]


def _part(record: dict[str, Any], part: str, where: str) -> Any:
    for name in FIELDS[part]:
        if record.get(name) is not None:
            return record[name]
    names = " or ".join(map(repr, FIELDS[part]))
    raise CorpusError(f"{where} has no {names}; it has {', '.join(map(repr, record)) or 'no fields'}")


def _text(value: Any, what: str, where: str, *, empty: bool = False, strip: bool = True) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {what} is {json_kind(value)}, not a string")
    if not (text := value.strip()) and not empty:
        raise CorpusError(f"{where}: {what} is empty")
    return text if strip else value


def _answer(answer: Any, choices: Sequence[str], where: str, by_letter: bool) -> int:
    """Find the index of the choice that an answer means; see `_answers_are_letters`."""
    letters = ascii_uppercase[: len(choices)]
    if answer in ("", "-1", -1):
        raise CorpusError(f"{where}: the answer is {answer!r}, which stands for none: take a split that has answers")
    if isinstance(answer, str):
        by_text = {i for i, choice in enumerate(choices) if choice == answer.strip()}
        meant = {i for i, letter in enumerate(letters) if letter == answer.strip()}
        meant = meant if meant and by_letter else meant | by_text
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
