from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from confsteer import CorpusError
from confsteer.text.question_shapes import _unmarked
from confsteer.text.questions import Question, QuestionSource, read_questions
from tests.paths import SHARED

CORPORA = SHARED / "corpora"
PLAIN = {"question": "Which?", "choices": ["red", "green", "blue"], "answer": 1}


def read(folder: Path, *records: Any) -> list[Question]:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_questions([file])


@pytest.mark.parametrize("answer", [1, "B", "green", " green\n"])
def test_an_answer_is_an_index_a_letter_or_a_text(tmp_path: Path, answer: Any) -> None:
    assert read(tmp_path, PLAIN | {"answer": answer}) == [Question("Which?", ("red", "green", "blue"), 1, id="1")]


def test_where_answers_are_letters_a_letter_is_one_though_it_is_a_choice_too(tmp_path: Path) -> None:
    grades = {"question": "Which grade?", "choices": ["D", "A", "B", "C"], "answer": "B"}
    assert [question.answer for question in read(tmp_path, PLAIN | {"answer": "C"}, grades)] == [2, 1]
    with pytest.raises(CorpusError, match="may mean choice 2 and 3"):
        read(tmp_path, PLAIN | {"answer": "C"}, PLAIN | {"answer": "red"}, grades)


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
        Question("Which?", ("red", "green"), 1, id="1", record={"other": 1}),
        Question("Which?", ("red", "green"), 1, "Colours.", id="2", record={"other": 1}),
    ]


def test_letters_that_not_all_choices_have_are_part_of_them(tmp_path: Path) -> None:
    (question,) = read(tmp_path, PLAIN | {"choices": ["(A)red", "(C)green"]})
    assert question.choices == ("(A)red", "(C)green")


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
        (PLAIN | {"answer": -1}, "the answer is -1, which stands for none: take a split that has answers"),
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
    with pytest.raises(CorpusError, match=r"a\.txt: questions are read from \.json, \.jsonl, \.ndjson, \.csv"):
        read_questions([file])


@pytest.mark.skipif(not (CORPORA / "mmlu").exists(), reason="needs the shared corpora")
def test_all_of_mmlu_can_be_read() -> None:
    path = CORPORA / "mmlu" / "test.jsonl"
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    questions = read_questions([path])
    assert [question.answer for question in questions] == ["ABCD".index(record["answer"]) for record in records]
    assert {question.record["subject"] for question in questions} == {record["subject"] for record in records}


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


LABELLED = {"choices": {"text": ["red", "green"], "label": ["A", "B"]}, "answerKey": "B"}
LOGGED = {
    "doc_id": 3,
    "doc": {"subject": "colours", "question": "Which?", "choices": ["red", "green"], "answer": 1},
    "target": "1",
    "arguments": {
        "gen_args_0": {"arg_0": "Which?\nA. red\nB. green\nAnswer:", "arg_1": " A"},
        "gen_args_1": {"arg_0": "Which?\nA. red\nB. green\nAnswer:", "arg_1": " B"},
    },
    "resps": [[["-1.5", "False"]], [["-0.5", "True"]]],
    "filter": "none",
    "metrics": ["acc"],
}


@pytest.mark.parametrize(
    ("record", "question"),
    [
        pytest.param(
            {"id": "Mercury_7", "question": "Which?", **LABELLED},
            Question("Which?", ("red", "green"), 1, id="Mercury_7"),
            id="ARC",
        ),
        pytest.param(
            {"question": "Which?", "choices": {"text": ["red", "green"], "label": ["1", "2"]}, "answerKey": "2", "id": "7"},
            Question("Which?", ("red", "green"), 1, id="7"),
            id="ARC with numbers",
        ),
        pytest.param(
            {"id": "7-980", "question_stem": "The sun is", "fact1": "the sun is a star", **LABELLED},
            Question("The sun is", ("red", "green"), 1, id="7-980", record={"fact1": "the sun is a star"}),
            id="OpenBookQA",
        ),
        pytest.param(
            {
                "ind": 24,
                "activity_label": "Roof shingle removal",
                "ctx_a": "A man is on a roof [header] Tools [title] Get one.",
                "ctx_b": "he",
                "ctx": "A man is on a roof. he",
                "endings": ["is using wrap. ", "[step] rips  a level."],
                "source_id": "activitynet~v_1",
                "split": "val",
                "label": "1",
            },
            Question(
                "Roof shingle removal: A man is on a roof Tools. Get one. He",
                ("is using wrap.", "rips a level."),
                1,
                kind="completion",
                id="24",
                record={"ind": 24, "activity_label": "Roof shingle removal", "source_id": "activitynet~v_1", "split": "val"},
            ),
            id="HellaSwag",
        ),
        pytest.param(
            {"goal": "Boil an egg", "sol1": "in water", "sol2": "in sand", "label": 0},
            Question("Boil an egg", ("in water", "in sand"), 0, id="2"),
            id="PIQA",
        ),
        pytest.param(
            {"question": "is grass green", "passage": "Grass is green.", "answer": True},
            Question("is grass green?", ("no", "yes"), 1, "Grass is green.", id="2"),
            id="BoolQ",
        ),
        pytest.param(
            {"question": "is grass red", "passage": "Grass is green.", "idx": 5, "label": 0},
            Question("is grass red?", ("no", "yes"), 0, "Grass is green.", id="5", record={"idx": 5}),
            id="SuperGLUE's BoolQ",
        ),
        pytest.param(
            {"sentence": "The cup fell off the table as _ was wet.", "option1": "the cup", "option2": "the table", "answer": "2"},
            Question("The cup fell off the table as _ was wet.", ("the cup", "the table"), 1, kind="blank", id="2"),
            id="WinoGrande",
        ),
        pytest.param(
            {"question": "Which?", "subject": "anatomy", "choices": ["red", "green"], "answer": 1},
            Question("Which?", ("red", "green"), 1, id="2", record={"subject": "anatomy"}),
            id="MMLU",
        ),
        pytest.param(
            LOGGED,
            Question(
                "Which?\nA. red\nB. green\nAnswer:",
                (" A", " B"),
                1,
                kind="served",
                contexts=("Which?\nA. red\nB. green\nAnswer:",) * 2,
                id="3",
                record={"subject": "colours"},
            ),
            id="lm-eval",
        ),
    ],
)
def test_records_of_benchmarks_are_recognised_by_their_fields(tmp_path: Path, record: Any, question: Question) -> None:
    _, found = read(tmp_path, PLAIN, record)
    assert found == question


def test_hellaswag_is_worded_as_by_lm_eval() -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess

    for text in (" A [header] Tools [title] Get  one [step] two.", "[header] How [title] That", "plain"):
        assert _unmarked(text) == preprocess(text)


def test_a_sample_that_lm_eval_logged_says_which_choice_is_right(tmp_path: Path) -> None:
    arguments = {f"gen_args_{i}": {"arg_0": "Which?", "arg_1": f" {text}"} for i, text in enumerate(("red", "green", "7"))}
    assert read(tmp_path, LOGGED | {"target": "green", "arguments": arguments})[0].answer == 1
    # Each filter logs all samples again; those that differ stay.
    assert len(read(tmp_path, LOGGED, LOGGED | {"filter": "other"}, LOGGED | {"arguments": arguments, "target": "0"})) == 2
    # After the choices given the question come the choices by themselves.
    alone = {f"gen_args_{i + 3}": {"arg_0": "", "arg_1": f" {text}"} for i, text in enumerate(("red", "green", "7"))}
    mutual = LOGGED | {"arguments": arguments | alone, "target": "red", "metrics": ["acc", "acc_mutual_info"]}
    assert read(tmp_path, mutual)[0].choices == (" red", " green", " 7")
    # WinoGrande's text before the choices differs, and what comes after is the same.
    doc = {"sentence": "It fell as _ was wet.", "option1": "the cup", "option2": "it", "answer": "2"}
    filled = {f"gen_args_{i}": {"arg_0": f"It fell as {text}", "arg_1": " was wet."} for i, text in enumerate(("the cup", "it"))}
    assert read(tmp_path, LOGGED | {"doc": doc, "arguments": filled, "target": "was wet."})[0].answer == 1
    for wrong, says in (
        ({"arguments": arguments, "target": "blue"}, "the target 'blue' does not say which of the 3 choices is right"),
        (
            {"arguments": {"gen_args_0": {"arg_0": "Which?", "arg_1": {"until": ["\n"]}}}},
            "lm-eval did not ask multiple choice here",
        ),
    ):
        with pytest.raises(CorpusError, match=says):
            read(tmp_path, LOGGED | wrong)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "Which?", **LABELLED, "answerKey": "C"}, "the answer 'C' is not among the labels A, B"),
        ({"question": "Which?", **LABELLED, "answerKey": ""}, "the answer is '', which stands for none: take a split"),
        ({"question": "Which?", "choices": ["a", "b"], "answerKey": "A"}, "are an object with the lists 'text' and 'label'"),
        ({"question": "Which?", "choices": {"a": "b"}, "answer": "A"}, "the choices are an object, not a list of strings"),
        ({"goal": "Boil", "sol1": "a", "sol2": "b", "label": -1}, "the answer is -1, which stands for none"),
        ({"sentence": "No blank.", "option1": "a", "option2": "b", "answer": "1"}, "has a string 'sentence' with one '_'"),
        ({"sentence": "A _.", "option1": "a", "option2": "b", "answer": ""}, "the answer is '', which stands for none"),
        ({"endings": "a", "ctx": "b", "label": "0"}, "a list of strings 'endings'"),
        ({"question": "is it", "passage": "It is.", "answer": "perhaps"}, "the answer 'perhaps' is not among the choices"),
    ],
)
def test_records_of_benchmarks_that_are_wrong_are_said_so(tmp_path: Path, record: Any, says: str) -> None:
    with pytest.raises(CorpusError, match=rf"a\.jsonl, line 1: .*{says}"):
        read(tmp_path, record)


def test_csv_is_read_as_mmlu_has_it(tmp_path: Path) -> None:
    (tmp_path / "anatomy_test.csv").write_text('"Which,\nthen?",red,green,blue,7,C\nWhich?,a,b,c,d,A\n')
    (tmp_path / "other.csv").write_text("question,A,B,answer\nWhich?,red,green,B\n")
    assert read_questions([tmp_path / "anatomy_test.csv"]) == [
        Question("Which,\nthen?", ("red", "green", "blue", "7"), 2, id="1", record={"subject": "anatomy"}),
        Question("Which?", ("a", "b", "c", "d"), 0, id="2", record={"subject": "anatomy"}),
    ]
    assert [question.record["subject"] for question in read_questions([tmp_path])] == ["anatomy", "anatomy", "other"]
    (tmp_path / "anatomy_test.csv").write_text("Which?,red\n")
    with pytest.raises(CorpusError, match=r"anatomy_test\.csv, row 1 has 2 cells: a question is a row"):
        read_questions([tmp_path])


def test_a_dataset_of_questions_is_told_from_one_of_texts(tmp_path: Path) -> None:
    for name, record in (
        ("texts", {"text": "It was the best of times."}),
        ("arc", {"question": "Which?", "id": "7", **LABELLED}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(record) + "\n")
    texts, arc = (QuestionSource(dataset=str(tmp_path / name)) for name in ("texts", "arc"))
    assert not texts.looks_like_questions()
    assert arc.looks_like_questions()
    assert arc.read() == [Question("Which?", ("red", "green"), 1, id="7")]
    assert arc.title == "arc train"
    with pytest.raises(CorpusError, match="cannot load dataset"):
        QuestionSource(dataset=str(tmp_path / "none")).read()
