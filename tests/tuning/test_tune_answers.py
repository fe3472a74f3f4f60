from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch

from confsteer import CorpusError, Steering
from confsteer.evaluation.choice_sample import ChoiceSample, read_choices
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.report.page import render
from confsteer.report.results import read_result
from confsteer.results.bootstrap import Interval
from confsteer.text.prompts import AS_TEXT
from confsteer.text.questions import Question
from confsteer.tuning.parameters import NeuronParameters
from confsteer.tuning.tune_answers import answer_loss_and_gradient, split_questions, tune_answers
from tests.planted import planted


def some_questions(number: int, passages: int = 0) -> list[Question]:
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"t{draw.randint(1, 95)}" for _ in range(n))

    texts = [words(3) for _ in range(passages)]
    return [
        Question(words(5), (words(1), words(2), words(3)), draw.randrange(3), draw.choice(texts) if texts else "")
        for _ in range(number)
    ]


def read(number: int, passages: int = 0) -> ChoiceSample:
    found = planted("llama")
    return read_choices(Reader(found.model, found.profile), found.tokenizer, some_questions(number, passages))


def test_the_gradient_is_that_of_the_loss() -> None:
    """Against central differences, on the sample of the vocabulary; the temperature's logarithm is the last parameter."""
    sample, ways = read(12), NeuronParameters(planted("llama").profile)
    sample.reading.draw_sample()
    at = 0.1 * torch.randn(ways.number + 1, generator=torch.Generator().manual_seed(0))
    _, gradient = answer_loss_and_gradient(sample, ways, at)
    for i in (0, ways.number // 2, ways.number - 1, ways.number):
        step = torch.zeros_like(at)
        step[i] = 1e-2
        above, below = (float(answer_loss_and_gradient(sample, ways, at + sign * step)[0]) for sign in (1, -1))
        assert float(gradient[i]) == pytest.approx((above - below) / 2e-2, abs=2e-4, rel=2e-2)


def test_the_parts_share_no_passage_and_hold_every_question() -> None:
    sample = read(80, passages=30)
    parts = split_questions(sample, AS_TEXT, seed=0)[:4]
    assert sum(len(part.questions) for part in parts) == 80
    passages = [{question.passage for question in part.questions} for part in parts]
    assert sum(map(len, passages)) == len(set.union(*passages))
    with pytest.raises(CorpusError, match=r"questions: 12 questions are too few to tune on, .*; give 20 or more"):
        split_questions(read(12), AS_TEXT, seed=0)


def test_what_is_gained_is_gained_over_a_temperature(tmp_path: Path) -> None:
    """Right choices are what the model itself would draw at a temperature: neurons have nothing to add, and it says so."""
    found = planted("llama")
    sample = read(60)
    (neutral,) = sample.log_likelihoods([Intervention.neutral(sample.reading.readout.n_neurons)])
    drawn = torch.multinomial((neutral / 3).softmax(dim=1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    questions = [question._replace(answer=int(i)) for question, i in zip(sample.questions, drawn, strict=True)]
    result = tune_answers(found.model, found.tokenizer, {"quiz": questions}, found.profile, parameters="dials")
    assert not result.gained
    assert result.alone == pytest.approx(3, rel=0.7)
    assert sum(result.questions.values()) == 60
    assert [row.kind for row in result.choices[0].rows] == [
        "neutral",
        "chance",
        "temperature",
        "steering",
        "matched temperature",
    ]
    assert type(result).model_validate_json(result.model_dump_json()) == result
    # Only an interval below zero is a gain.
    assert result.model_copy(update={"validation": Interval(-0.2, -0.3, -0.1)}).gained

    (tmp_path / "r.json").write_text(result.model_dump_json())
    assert read_result(tmp_path / "r.json") == result
    assert "No, it is refused." in render(result, None)
    from confsteer.report.answer_tables import print_answer_tuning
    from confsteer.report.columns import TableConsole

    console = TableConsole(record=True, width=160, file=io.StringIO())
    print_answer_tuning(console, result)
    assert "against the temperature alone" in console.export_text().replace("\n", " ")
    assert Steering() != result.steering
