"""Shapes of the records of multiple-choice benchmarks, told apart by their fields.

| shape | fields |
|---|---|
| plain, AGIEval, MMLU | ``question``, ``choices`` or ``options``, ``answer`` or ``label`` |
| ARC, CommonsenseQA | ``question``, ``choices`` with ``text`` and ``label``, ``answerKey`` |
| OpenBookQA | the same with ``question_stem`` |
| HellaSwag | ``ctx`` (or ``ctx_a`` and ``ctx_b``), ``endings``, ``label`` |
| PIQA | ``goal``, ``sol1``, ``sol2``, ``label`` |
| BoolQ | ``question``, ``passage``, and a truth value ``answer`` or ``label``, without choices |
| WinoGrande | ``sentence`` with a ``_``, ``option1``, ``option2``, ``answer`` |
| lm-eval's logged samples | ``doc``, ``arguments``, ``target`` |

Their questions are worded as in lm-eval's tasks of the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from confsteer.errors import CorpusError
from confsteer.text.windows import json_kind

Kind = Literal["question", "completion", "blank", "served"]
"""Use of the choices: they answer a question, continue a text, or fill its ``_``. Or lm-eval asked before, and logged."""
FIELDS = {
    "question": ("question",),
    "choices": ("choices", "options"),
    "answer": ("answer", "label"),
    "passage": ("passage", "context"),
}
"""Names for each part in a plain record. The first one that is there and not null is read."""


class Shape(NamedTuple):
    """A shape of records."""

    name: str
    needs: tuple[str, ...]
    """Fields by which it is recognised."""
    read: Callable[[dict[str, Any], str], dict[str, Any]]
    """Function from a record, and its place in a file, to a plain record. A logged one also has ``contexts``."""
    kind: Kind = "question"
    """See `confsteer.text.questions.Question`."""
    lacks: tuple[str, ...] = ()
    """Fields that it must not have."""

    @property
    def fields(self) -> set[str]:
        """Fields that are part of the question. The others are the record's own."""
        return {*self.needs, "id", "ctx", "ctx_a", "ctx_b", *(name for names in FIELDS.values() for name in names)}


def shape_of(record: Mapping[str, Any]) -> Shape | None:
    """Recognise a record by its fields. None if it is not a question."""
    for shape in SHAPES:
        if all(name in record for name in shape.needs) and not any(name in record for name in shape.lacks):
            return shape
    if all(any(name in record for name in FIELDS[part]) for part in ("question", "choices", "answer")):
        return PLAIN
    return None


def _labelled(question: str) -> Callable[[dict[str, Any], str], dict[str, Any]]:
    """Read ``{"choices": {"text": […], "label": […]}, "answerKey": "A"}``, as ARC and OpenBookQA have it."""

    def read(record: dict[str, Any], where: str) -> dict[str, Any]:
        choices = record["choices"]
        if not isinstance(choices, dict) or not all(isinstance(choices.get(name), list) for name in ("text", "label")):
            raise CorpusError(
                f"{where}: the choices of a record with 'answerKey' are an object with the lists 'text' and 'label'"
            )
        labels, key = [str(label) for label in choices["label"]], str(record["answerKey"])
        if key and key not in labels:
            raise CorpusError(f"{where}: the answer {key!r} is not among the labels {', '.join(labels)}")
        return {"question": record[question], "choices": choices["text"], "answer": labels.index(key) if key else ""}

    return read


def _hellaswag(record: dict[str, Any], where: str) -> dict[str, Any]:
    context = (
        record.get("ctx") if record.get("ctx_a") is None else f"{record['ctx_a']} {str(record.get('ctx_b', '')).capitalize()}"
    )
    if not isinstance(context, str) or not isinstance(record["endings"], list):
        raise CorpusError(f"{where}: a record with 'endings' has a string 'ctx' and a list of strings 'endings'")
    about = f"{record['activity_label']}: " if record.get("activity_label") else ""
    return {
        "question": _unmarked(about + context),
        "choices": [_unmarked(ending) if isinstance(ending, str) else ending for ending in record["endings"]],
        "answer": _index(record["label"]),
    }


def _unmarked(text: str) -> str:
    """Leave out WikiHow's marks, as lm-eval does: ``[title]`` ends a sentence, and other brackets are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(record: dict[str, Any], where: str) -> dict[str, Any]:
    return {
        "question": record["goal"],
        "choices": [record["sol1"], record["sol2"]],
        "answer": _index(record["label"]),
    }


def _boolq(record: dict[str, Any], where: str) -> dict[str, Any]:
    answer = record.get("answer", record.get("label"))
    question = record["question"]
    return {
        "question": f"{question}?" if isinstance(question, str) and not question.rstrip().endswith("?") else question,
        "choices": ["no", "yes"],
        "answer": int(answer) if isinstance(answer, bool) else _index(answer),
        "passage": record["passage"],
    }


def _winogrande(record: dict[str, Any], where: str) -> dict[str, Any]:
    sentence = record["sentence"]
    if not isinstance(sentence, str) or sentence.count("_") != 1:
        raise CorpusError(f"{where}: a record with 'option1' has a string 'sentence' with one '_', which the options fill")
    number = _index(record["answer"])
    return {
        "question": sentence,
        "choices": [record["option1"], record["option2"]],
        "answer": number - 1 if isinstance(number, int) and number > 0 else number,
    }


def _logged(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Read a question as lm-eval asked it, from a line of the files that ``--log_samples`` writes."""
    arguments = record["arguments"]
    pairs = [[*pair.values()] if isinstance(pair, dict) else pair for pair in _values(arguments)]
    if not all(isinstance(pair, list) and len(pair) >= 2 and all(isinstance(text, str) for text in pair[:2]) for pair in pairs):
        raise CorpusError(f"{where}: lm-eval did not ask multiple choice here: no pair of strings in each of 'arguments'")
    if "acc_mutual_info" in record.get("metrics", ()):
        # Take the first half: after the choices given the question come the choices by themselves.
        pairs = pairs[: len(pairs) // 2]
    contexts, choices = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {
        "question": contexts[0] if contexts else "",
        "choices": choices,
        "answer": _logged_answer(record, contexts, choices, where),
        "contexts": contexts,
    }


def _logged_answer(record: dict[str, Any], contexts: Sequence[str], choices: Sequence[str], where: str) -> int:
    """Find the right choice of a logged sample, whose ``target`` is the text or the index of one, written as a string."""
    doc, target = record["doc"], str(record["target"])
    if len(set(contexts)) > 1 and isinstance(doc, dict) and (shape := shape_of(doc)):
        # Read the record: the text after each choice is the same, so only the record says which is right.
        answer = shape.read(doc, where).get("answer")
        meant = {answer} if type(answer) is int else set()
    else:
        meant = {i for i, choice in enumerate(choices) if choice.strip() == target.strip()}
        meant |= {int(target)} if target.isdecimal() and len(set(contexts)) == 1 else set()
    meant = {i for i in meant if 0 <= i < len(choices)}
    if len(meant) != 1:
        raise CorpusError(
            f"{where}: the target {target[:40]!r} does not say which of the {len(choices)} choices is right: leave the sample out"
        )
    return int(meant.pop())


def _values(arguments: Any) -> list[Any]:
    return [*arguments.values()] if isinstance(arguments, dict) else list(arguments) if isinstance(arguments, list) else [None]


def _index(label: Any) -> Any:
    """Turn a digit in quotes into a number. HellaSwag's and WinoGrande's labels are such digits."""
    return int(label) if isinstance(label, str) and label.isdecimal() else label


def _plain(record: dict[str, Any], where: str) -> dict[str, Any]:
    choices = next((record[name] for name in FIELDS["choices"] if record.get(name) is not None), None)
    if isinstance(choices, dict):
        raise CorpusError(f"{where}: the choices are {json_kind(choices)}, not a list of strings (ARC's have an 'answerKey' too)")
    return record


PLAIN = Shape("plain", (), _plain)
SHAPES = (
    Shape("lm-eval's logged sample", ("doc", "arguments", "target"), _logged, "served"),
    Shape("HellaSwag", ("endings", "label"), _hellaswag, "completion"),
    Shape("PIQA", ("goal", "sol1", "sol2", "label"), _piqa),
    Shape("WinoGrande", ("sentence", "option1", "option2", "answer"), _winogrande, "blank"),
    Shape("OpenBookQA", ("question_stem", "choices", "answerKey"), _labelled("question_stem")),
    Shape("ARC", ("question", "choices", "answerKey"), _labelled("question")),
    Shape("BoolQ", ("question", "passage", "answer"), _boolq, lacks=("choices", "options", "label")),
    Shape("SuperGLUE's BoolQ", ("question", "passage", "label"), _boolq, lacks=("choices", "options", "answer")),
)
