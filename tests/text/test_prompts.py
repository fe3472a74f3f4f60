from __future__ import annotations

from pathlib import Path

import pytest

from confsteer import CorpusError, SettingError
from confsteer.text.prompts import Wording, read_template
from confsteer.text.questions import Question
from tests.models import tiny_tokenizer

QUESTION = Question("Which?", ("red", "green", "blue"), 1, record={"subject": "colours"})
BLANK = Question("It fell as _ was wet.", ("the cup", "it"), 1, kind="blank")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_wordings_are_those_of_lm_eval() -> None:
    """Of ARC, MMLU, HellaSwag and WinoGrande; the last scores the rest of the sentence."""
    tokenizer = tiny_tokenizer()
    asked = Wording().ask(QUESTION, tokenizer)
    assert set(asked.contexts) == {"Question: Which?\nAnswer:"}
    assert asked.continuations == (" red", " green", " blue")
    with_passage = Wording().ask(QUESTION._replace(passage="Colours."), tokenizer)
    assert with_passage.contexts[0] == "Colours.\nQuestion: Which?\nAnswer:"
    asked = Wording("letters").ask(QUESTION, tokenizer)
    assert set(asked.contexts) == {"Which?\nA. red\nB. green\nC. blue\nAnswer:"}
    assert asked.continuations == (" A", " B", " C")
    asked = Wording().ask(Question("Roof: A man", ("falls.", "flies."), 0, kind="completion"), tokenizer)
    assert (asked.contexts[0], asked.continuations) == ("Roof: A man", (" falls.", " flies."))
    asked = Wording().ask(BLANK, tokenizer)
    assert (asked.contexts, asked.continuations) == (("It fell as the cup", "It fell as it"), (" was wet.",) * 2)
    asked = Wording("letters").ask(BLANK, tokenizer)
    assert asked.contexts[0] == "It fell as _ was wet.\nA. the cup\nB. it\nAnswer:"


def test_examples_stand_before_a_question_with_their_answers() -> None:
    shots = (Question("What?", ("this", "that"), 0), Question("Who?", ("she", "he"), 1))
    (context, *_) = Wording("letters", shots=shots).ask(QUESTION, tiny_tokenizer()).contexts
    first, second, last = context.split("\n\n")
    assert first == "What?\nA. this\nB. that\nAnswer: A"
    assert second.endswith("Answer: B")
    assert last == "Which?\nA. red\nB. green\nC. blue\nAnswer:"
    assert Wording(shots=shots).ask(QUESTION, tiny_tokenizer()).contexts[0].startswith("Question: What?\nAnswer: this\n\n")


def test_a_chat_is_turns_in_the_tokenizers_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    shots = (Question("What?", ("this", "that"), 1),)
    asked = Wording("letters", chat=True, shots=shots).ask(QUESTION, tokenizer)
    assert asked.rendered
    assert asked.continuations == ("A", "B", "C")
    assert asked.contexts[0] == (
        "<user>What?\nA. this\nB. that\nAnswer:</><assistant>B</><user>Which?\nA. red\nB. green\nC. blue\nAnswer:</><assistant>"
    )
    with pytest.raises(CorpusError, match="no chat template"):
        Wording(chat=True).ask(QUESTION, tiny_tokenizer())


def test_a_template_of_the_users_writes_what_comes_before_the_answer(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "About {{ subject }}: {{ question }} {% for l, c in lettered %}({{ l }}) {{ c }} {% endfor %}\n"
    )
    from_file = read_template(str(tmp_path / "t.jinja"))
    asked = Wording("letters", from_file).ask(QUESTION, tiny_tokenizer())
    # It ends in a space, so that no other is put before the answer.
    assert asked.contexts[0] == "About colours: Which? (A) red (B) green (C) blue "
    assert asked.continuations == ("A", "B", "C")
    assert asked.verbatim(1).endswith("(C) blue B")
    assert Wording("text", read_template("{{ question }}")).ask(QUESTION, tiny_tokenizer()).continuations[0] == " red"


def test_what_cannot_be_asked_is_a_sentence() -> None:
    with pytest.raises(SettingError, match="neither a file with a template nor a template"):
        read_template("nowhere.jinja")
    with pytest.raises(SettingError, match="no jinja: line 1"):
        read_template("{{ question }")
    with pytest.raises(
        CorpusError, match=r"question: the template does not fit it: 'topic' is undefined; it has question, .*subject"
    ):
        Wording("text", "{{ topic }}").ask(QUESTION, tiny_tokenizer())
    with pytest.raises(CorpusError, match="the template writes nothing"):
        Wording("text", "{% if false %}{{ question }}{% endif %}").ask(QUESTION, tiny_tokenizer())
    # A template comes from anyone, and reaches nothing.
    with pytest.raises(CorpusError, match="does not fit"):
        Wording("text", "{{ question.__class__.__mro__ }}").ask(QUESTION, tiny_tokenizer())
    served = QUESTION._replace(kind="served", contexts=("Which?",) * 3)
    assert Wording().ask(served, tiny_tokenizer()).continuations == QUESTION.choices
    with pytest.raises(CorpusError, match="asked as it was there: leave out letters"):
        Wording("letters").ask(served, tiny_tokenizer())
