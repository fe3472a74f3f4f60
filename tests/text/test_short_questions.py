from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from confsteer import CorpusError
from confsteer.text.prompts import IN_WORDS, ShortWording
from confsteer.text.short_questions import ShortQuestion, final_number, normalised, read_short_questions
from tests.models import chat_tokenizer, tiny_tokenizer


def written(folder: Path, *records: Any) -> Path:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"question": "Who?", "answer": "Ada"}, ("Ada",)),
        ({"question": "Who?", "answers": ["Ada", "Ada Lovelace", "Ada"]}, ("Ada", "Ada Lovelace")),
        ({"question": "How many?", "answer": 8}, ("8",)),
        (
            {"question": "Who?", "answer": {"value": "Ada", "aliases": ["Lovelace"], "type": "WikipediaEntity"}},
            ("Ada", "Lovelace"),
        ),
        ({"question": "Who?", "context": "It was Ada.", "answers": {"text": ["Ada"], "answer_start": [7]}}, ("Ada",)),
        ({"question": "How many?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"}, ("42",)),
    ],
)
def test_records_of_the_usual_shapes(tmp_path: Path, record: dict[str, Any], answers: tuple[str, ...]) -> None:
    (found,) = read_short_questions([written(tmp_path, {**record, "id": "x1", "level": 3})])
    assert found.answers == answers
    assert (found.id, found.record) == ("x1", {"level": 3})
    assert found.passage == record.get("context", "")
    is_number = "####" in str(record.get("answer"))
    assert (found.kind, found.worked) == (("number", record["answer"]) if is_number else ("words", ""))


def test_what_lm_eval_logged_is_asked_as_it_was_there(tmp_path: Path) -> None:
    doc = {"question": "Who?", "answer": {"value": "Ada", "aliases": ["Lovelace"]}, "field": "history"}
    argument = {"arg_0": "Q: Who was it?\nA:", "arg_1": {"until": ["\n", "."], "do_sample": False}}
    record = {"doc_id": 4, "doc": doc, "target": ["Lovelace"], "arguments": {"gen_args_0": argument}, "filter": "one"}
    (found,) = read_short_questions([written(tmp_path, record, {**record, "filter": "two"})])
    assert (found.context, found.until, found.answers) == ("Q: Who was it?\nA:", ("\n", "."), ("Ada", "Lovelace"))
    assert (found.id, found.record) == ("4", {"field": "history"})
    assert IN_WORDS.ask(found, tiny_tokenizer()) == "Q: Who was it?\nA:"
    with pytest.raises(CorpusError, match="lm-eval logged, and is asked as it was there: leave out own words, chat"):
        ShortWording(chat=True).ask(found, chat_tokenizer())
    # A task that keeps no answers in its records has a target alone.
    (found,) = read_short_questions([written(tmp_path, {**record, "doc": {"text": "Who?"}, "target": "Ada"})])
    assert found.answers == ("Ada",)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ([], "line 1 is a list, not an object"),
        ({"answer": "Ada"}, "has no string 'question'; it has 'answer'"),
        ({"question": "Who?", "choices": ["Ada", "Bob"], "answer": "A"}, "has 'choices': it is .* which --choices asks"),
        ({"question": "Who?"}, "has no accepted answer"),
        ({"question": "Who?", "answers": {"text": [], "answer_start": []}}, "has no accepted answer"),
        ({"question": "Who?", "answer": True}, "has no accepted answer"),
        ({"question": "Who?", "answer": "much #### none"}, "has nothing to compare"),
        ({"question": "Who?", "answer": "Ada", "context": 3}, "the passage is a number, not a string"),
        ({"doc": {}, "arguments": [["Who?", " Ada"]], "target": 0}, "did not ask the model to write"),
    ],
)
def test_what_is_no_short_question_is_refused(tmp_path: Path, record: Any, sentence: str) -> None:
    with pytest.raises(CorpusError, match=sentence):
        read_short_questions([written(tmp_path, record)])


def test_answers_are_compared_as_squad_compares_them() -> None:
    question = ShortQuestion("Who?", ("The Beatles!",))
    for right in ("beatles", "Beatles.", "  the  BEATLES\n", "the 'Beatles'"):
        assert question.accepts(right)
    for wrong in ("", "The", "Beatle", "It was the Beatles"):
        assert not question.accepts(wrong)
    # Nothing is normalised away altogether.
    assert [normalised(text) for text in ("A", "the", "+", "C#", "")] == ["a", "the", "+", "c", ""]


@given(st.text(max_size=20))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_the_number_that_counts_is_the_marked_or_the_last_one() -> None:
    said = {
        "2 and 2 make 4": "4",
        "It costs $1,234.50 in all.": "1234.5",
        "#### 7 apples, 3 pears": "7",
        "first #### 1\nno: #### 72": "72",
        "-3": "-3",
        "5-3": "3",
        "007": "7",
        "12.0": "12",
        ".50": "0.5",
        "none": "",
        "9" * 5000: "9" * 5000,
    }
    assert {text: final_number(text) for text in said} == said
    question = ShortQuestion("How many?", ("1234.5",), kind="number")
    assert question.accepts("so 1,234.50")
    assert not question.accepts("none")


def test_an_accepted_answer_within_a_sentence_is_mentioned_and_not_right() -> None:
    question = ShortQuestion("What is the capital of France?", ("Paris", "the City of Paris"))
    said = {"Paris.": False, "The capital is Paris!": True, "It is the city of Paris": True, "Parish": False, "": False}
    assert {text: question.is_mentioned_in(text) for text in said} == said
    assert question.accepts("Paris.")
    assert not any(question.accepts(text) for text, mentioned in said.items() if mentioned)
    assert not ShortQuestion("How many?", ("7",), kind="number").is_mentioned_in("7 or 8")


@settings(max_examples=30)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_found_however_it_is_written(number: Any) -> None:
    assert final_number(f"it is {number:,}.") == final_number(f"#### {number}") != ""


def test_wordings() -> None:
    question = ShortQuestion("t1 t2", ("t3",), passage="t9", record={"level": 3})
    shots = (ShortQuestion("t4", ("t5", "t6")), ShortQuestion("t7", ("8",), kind="number", worked="t8 #### 8"))
    assert IN_WORDS.ask(question, tiny_tokenizer()) == "t9\nQuestion: t1 t2\nAnswer:"
    assert ShortWording(shots=shots).ask(question._replace(passage=""), tiny_tokenizer()) == (
        "Question: t4\nAnswer: t5\n\nQuestion: t7\nAnswer: t8 #### 8\n\nQuestion: t1 t2\nAnswer:"
    )
    assert ShortWording("{{ level }}: {{ question }}").ask(question, tiny_tokenizer()) == "3: t1 t2"
    chat = ShortWording(chat=True, shots=shots[1:]).ask(question, chat_tokenizer())
    assert chat.index("Work the answer out") < chat.index("t8 #### 8") < chat.index("Answer with a few words")
    assert ShortWording("{{ x }}", True, shots).title == "own words, own template, chat, 2 examples"
    with pytest.raises(
        CorpusError, match=r"quiz: the template does not fit it: 'x' is undefined; it has question, passage, kind, level"
    ):
        ShortWording("{{ x }}").ask(question, tiny_tokenizer(), "quiz")
