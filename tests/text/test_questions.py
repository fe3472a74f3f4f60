from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from confsteer import CorpusError
from confsteer.text.questions import Question, read_questions
from tests.paths import SHARED

CORPORA = SHARED / "corpora"
PLAIN = {"question": "Which?", "choices": ["red", "green", "blue"], "answer": 1}


def read(folder: Path, *records: Any) -> list[Question]:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_questions([file])


@pytest.mark.parametrize("answer", [1, "B", "green", " green\n"])
def test_an_answer_is_an_index_a_letter_or_a_text(tmp_path: Path, answer: Any) -> None:
    assert read(tmp_path, PLAIN | {"answer": answer}) == [Question("Which?", ("red", "green", "blue"), 1)]


def test_agieval_is_read_as_it_is(tmp_path: Path) -> None:
    record = {
        "passage": None,
        "question": "Which? ",
        "options": ["(A)red", "(B) green"],
        "label": "B",
        "answer": None,
        "other": 1,
    }
    assert read(tmp_path, record, record | {"passage": "Colours."}) == [
        Question("Which?", ("red", "green"), 1),
        Question("Which?", ("red", "green"), 1, "Colours."),
    ]


def test_letters_that_not_all_choices_have_are_part_of_them(tmp_path: Path) -> None:
    (question,) = read(tmp_path, PLAIN | {"choices": ["(A)red", "(C)green"]})
    assert question.choices == ("(A)red", "(C)green")


def test_the_prompt_is_that_of_arc_and_sciq() -> None:
    question = Question("Which?", ("red", "green"), 0)
    assert question.prompt == "Question: Which?\nAnswer:"
    assert question._replace(passage="Colours.").prompt == "Colours.\nQuestion: Which?\nAnswer:"
    assert question.continuations == (" red", " green")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("Which?", "is a string, not an object with 'question'"),
        ({"question": "Which?", "answer": 1}, "has no 'choices' or 'options'; it has 'question', 'answer'"),
        ({"choices": ["a", "b"], "answer": 1}, "has no 'question'"),
        (PLAIN | {"answer": None}, "has no 'answer' or 'label'"),
        (PLAIN | {"question": " "}, "the question is empty"),
        (PLAIN | {"question": 3}, "the question is a number, not a string"),
        (PLAIN | {"passage": ["a"]}, "the passage is a list, not a string"),
        (PLAIN | {"choices": "red"}, "the choices are a string, not a list"),
        (PLAIN | {"choices": ["red"]}, "1 choices; a question needs two or more"),
        (PLAIN | {"choices": ["red", 2]}, "choice 2 is a number, not a string"),
        (PLAIN | {"choices": ["red", ""]}, "choice 2 is empty"),
        (PLAIN | {"answer": 3}, r"the answer 3 is not among the choices; .* letter \(A to C\) or its index \(0 to 2\)"),
        (PLAIN | {"answer": -1}, "the answer -1 is not among"),
        (PLAIN | {"answer": True}, "the answer True is not among"),
        (PLAIN | {"answer": [1]}, r"the answer \[1\] is not among"),
        (PLAIN | {"answer": "D"}, "the answer 'D' is not among"),
        (PLAIN | {"answer": "AB"}, "the answer 'AB' is not among"),
        (PLAIN | {"choices": ["B", "A"], "answer": "A"}, "the answer 'A' may mean choice 1 and 2; give its index"),
        (PLAIN | {"choices": ["red", "red"], "answer": "red"}, "the answer 'red' may mean choice 1 and 2"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, record: Any, says: str) -> None:
    with pytest.raises(CorpusError, match=rf"a\.jsonl, line 2:? ?{says}"):
        read(tmp_path, PLAIN, record)


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a\.jsonl has no questions"):
        read(tmp_path)
    file = tmp_path / "a.txt"
    file.write_text("Which?")
    with pytest.raises(CorpusError, match=r"a\.txt: questions are read from \.json"):
        read_questions([file])


@pytest.mark.skipif(not (CORPORA / "agieval").exists(), reason="needs the shared corpora")
@pytest.mark.parametrize("file", ["aqua-rat", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-math"])
def test_all_of_agieval_can_be_read(file: str) -> None:
    path = CORPORA / "agieval" / f"{file}.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = read_questions([path])
    assert len(questions) == len(records)
    for question, record in zip(questions, records, strict=True):
        right = record["options"]["ABCDE".index(record["label"])]
        assert right == f"({record['label']}){right[3:]}"
        assert question.choices[question.answer] == right[3:].strip()
