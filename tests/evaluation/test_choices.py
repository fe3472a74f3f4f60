from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import confsteer
from confsteer import CorpusError, Steering, SteeringError, demo
from confsteer.evaluation.answers import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    fit_answer_temperature,
    fit_logit,
    match_answer_entropy,
)
from confsteer.evaluation.choice_sample import encode, question_blocks, read_choices
from confsteer.evaluation.choices import answer, evaluate_choices
from confsteer.evaluation.metrics import calibration_metrics
from confsteer.evaluation.reader import Reader
from confsteer.last_layer.intervention import Intervention
from confsteer.results.bootstrap import Blocks
from confsteer.text.prompts import Asked, Wording
from confsteer.text.questions import Question
from tests.models import tiny_tokenizer
from tests.planted import planted


def some_questions(number: int, *, longest: int = 20, passages: int = 0, seed: int = 0) -> list[Question]:
    """Of the tiny tokenizer's words; the first are too long for the tiny models' context of 64."""
    generator = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(f"t{generator.randint(1, 95)}" for _ in range(n))

    texts = [words(5) for _ in range(passages)]
    questions = []
    for i in range(number):
        choices = tuple(words(generator.randint(1, 6)) for _ in range(generator.randint(2, 5)))
        question = words(70 if i < 2 else generator.randint(1, longest))
        passage = generator.choice(texts) if texts else ""
        questions.append(Question(question, choices, generator.randrange(len(choices)), passage))
    return questions


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return tokenizer


def naive(model: Any, tokenizer: Any, questions: list[Question], most: int) -> list[list[float]]:
    """One pass of the whole model for each choice."""
    found: list[list[float]] = []
    for question in questions:
        found.append([])
        asked = Wording().ask(question, tokenizer)
        prompt = tokenizer(asked.contexts[0])["input_ids"]
        for continuation in asked.continuations:
            whole = tokenizer(asked.contexts[0] + continuation)["input_ids"]
            own = whole[len(prompt) :]
            ids = torch.tensor([(prompt + own)[-(most + 1) :]])
            with torch.no_grad():
                log_p = model(ids[:, :-1], use_cache=False).logits.log_softmax(dim=-1)[0]
            found[-1].append(
                sum(float(log_p[i - 1, token]) for i, token in enumerate(ids[0].tolist()) if i >= ids.shape[1] - len(own))
            )
    return found


def flat(log_likelihood: Tensor) -> list[float]:
    return [x for x in log_likelihood.flatten().tolist() if x != -math.inf]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("bos", [False, True])
def test_log_likelihoods_are_those_of_a_pass_per_choice_of_the_steered_model(model_type: str, bos: bool) -> None:
    model, _, _, profile = planted(model_type)
    tokenizer = with_bos(tiny_tokenizer()) if bos else tiny_tokenizer()
    questions = some_questions(6)
    sample = read_choices(Reader(model, profile), tokenizer, questions)
    assert sample.truncated == 2
    for steering in (Steering(), Steering(entropy=0.1, scale={20: 0.0})):
        (ours,) = sample.log_likelihoods([Intervention.of(profile.edit(steering))])
        with confsteer.steer(model, profile, steering):
            theirs = naive(model, tokenizer, questions, 64)
        assert flat(ours) == pytest.approx([x for row in theirs for x in row], abs=1e-4)
        assert [(row > -math.inf).sum().item() for row in ours] == [len(row) for row in theirs]


def test_an_end_that_the_tokenizer_puts_after_texts_is_no_part_of_a_choice() -> None:
    tokenizer, ending = tiny_tokenizer(), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="t9 $A <eos>", special_tokens=[("<eos>", 0), ("t9", 9)])
    question = Wording().ask(Question("t1 t2 t3", ("t4", "t5 t6"), 0), tokenizer)
    sequences, _ = encode(question, tokenizer, 64)
    assert [own for _, own in sequences] == [[4], [5, 6]]
    assert encode(question, ending, 64)[0] == [([9, *context], own) for context, own in sequences]


def test_log_likelihoods_are_those_of_lm_eval() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, profile = demo.load()
    questions = [
        Question("What is the colour of grass?", ("green", "a very dark and melancholy blue", "red"), 0),
        Question(
            "Who wrote it?  ", ("Mr. Dickens", "nobody at all, said the old man, and was silent"), 1, "It was the best of times."
        ),
        Question("And then?", ("night fell", "the sun rose upon the hills"), 0, "The day was long. " * 150),
    ]
    sample = read_choices(Reader(model, profile), tokenizer, questions)
    assert sample.truncated == 1
    (ours,) = sample.log_likelihoods([Intervention.neutral(sample.reading.readout.n_neurons)])
    asked = [Wording().ask(question, tokenizer) for question in questions]
    pairs = [pair for one in asked for pair in zip(one.contexts, one.continuations, strict=True)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu").loglikelihood(requests, disable_tqdm=True)
    assert flat(ours) == pytest.approx([value for value, _ in theirs], abs=1e-3)


def test_rows_and_baselines() -> None:
    model, tokenizer, _, profile = planted("llama")
    questions = some_questions(30, longest=8)
    steering = Steering(entropy=0.4)
    (result,) = evaluate_choices(model, tokenizer, {"quiz": questions}, profile, [steering])
    kinds = [
        "neutral",
        "chance",
        "temperature",
        "temperature and length",
        "scoring",
        "scoring",
        "steering",
        "matched temperature",
    ]
    assert [row.kind for row in result.rows] == kinds
    assert (result.source, result.questions, result.blocks, result.unit) == ("quiz", 30, 30, "questions")
    neutral, _, fitted, *_, steered, matched = result.rows
    # What a steering does to the answers is read off the same closed form that other tests compare with the model.
    sample = read_choices(Reader(model, profile), tokenizer, questions)
    (ours,) = sample.log_likelihoods([Intervention.neutral(sample.reading.readout.n_neurons)])
    (theirs,) = sample.log_likelihoods([Intervention.of(profile.edit(steering))])
    assert neutral.metrics["accuracy"].value == pytest.approx(float((ours.argmax(1) == sample.gold).double().mean()))
    gold = theirs.log_softmax(1)[torch.arange(30), sample.gold]
    assert steered.metrics["loss"].value == pytest.approx(-float(gold.mean()))
    by_length = []
    for question, row in zip(questions, ours.tolist(), strict=True):
        per_character = [value / len(choice) for value, choice in zip(row, question.choices, strict=False)]
        by_length.append(per_character.index(max(per_character)) == question.answer)
    assert neutral.metrics["accuracy_normalised"].value == pytest.approx(sum(by_length) / 30)
    # Each half is judged with the temperature of the other.
    even, odd = torch.arange(30) % 2 == 0, torch.arange(30) % 2 == 1
    assert fitted.values == tuple(fit_answer_temperature(ours[seen], sample.gold[seen]) for seen in (odd, even))
    losses = [
        -(ours[use] / t).log_softmax(1)[torch.arange(15), sample.gold[use]]
        for use, t in zip((even, odd), fitted.values, strict=True)
    ]
    assert fitted.metrics["loss"].value == pytest.approx(float(torch.cat(losses).mean()))
    assert matched.metrics["entropy"].value == pytest.approx(steered.metrics["entropy"].value, abs=1e-6)
    assert matched.steering == steering
    # A temperature changes no answer.
    for row in (fitted, matched):
        assert row.minus["neutral"]["accuracy"] == (0, 0, 0)
        assert row.metrics["accuracy_normalised"] == neutral.metrics["accuracy_normalised"]
    assert neutral.minus.keys() == {"chance", "temperature"}
    assert steered.minus.keys() == {"neutral", "chance", "temperature", "matched temperature"}
    for name, difference in steered.minus["matched temperature"].items():
        assert difference.value == pytest.approx(steered.metrics[name].value - matched.metrics[name].value)
    for row in result.rows:
        if row.kind == "chance":
            continue
        assert sum(b.count for b in row.reliability) == 30
        assert row.coverage[-1] == pytest.approx(row.metrics["accuracy"].value)
    assert type(result).model_validate_json(result.model_dump_json()) == result


def test_some_of_the_questions_have_the_log_likelihoods_they_have_among_all() -> None:
    model, tokenizer, _, profile = planted("llama")
    sample = read_choices(Reader(model, profile), tokenizer, some_questions(8, longest=8))
    intervention = Intervention.of(profile.edit(Steering(entropy=0.4)))
    (whole,), rows = sample.log_likelihoods([intervention]), torch.tensor([1, 2, 6])
    (some,) = sample.at(rows).log_likelihoods([intervention])
    assert flat(some) == pytest.approx(flat(whole[rows]))
    assert sample.at(rows).gold.tolist() == sample.gold[rows].tolist()
    assert torch.equal(sample.at(rows).tokens.flatten()[:3], sample.tokens[rows].flatten()[:3])


def test_questions_of_one_passage_are_one_block() -> None:
    questions = some_questions(12, passages=3)
    block, unit = question_blocks([*questions, *some_questions(2, seed=1)])
    assert unit == "passages"
    assert len(block.unique()) == len({question.passage for question in questions}) + 2
    for i, one in enumerate(questions):
        for j, other in enumerate(questions):
            assert (block[i] == block[j]) == (one.passage == other.passage)
    assert question_blocks(some_questions(3))[1] == "questions"


def test_what_cannot_be_compared_is_refused_before_the_model_runs() -> None:
    model, tokenizer, _, profile = planted("gpt2")
    with pytest.raises(CorpusError, match=r"quiz: 1 questions \(1 questions\); .* give two or more"):
        evaluate_choices(model, tokenizer, {"quiz": some_questions(1)}, profile, [])
    with pytest.raises(CorpusError, match=r"quiz: 3 questions \(1 passages\)"):
        evaluate_choices(model, tokenizer, {"quiz": some_questions(3, passages=1)}, profile, [])
    with pytest.raises(SteeringError, match="out of reach"):
        evaluate_choices(model, tokenizer, {"quiz": some_questions(3)}, profile, [Steering(entropy=50.0)])
    long = [*some_questions(3), Question("t1", ("t2", "t3 " * 65), 0)]
    with pytest.raises(CorpusError, match=r"quiz, question 4: the choice 't3 .* has 65 tokens; this model needs 1 to 64"):
        evaluate_choices(model, tokenizer, {"quiz": long}, profile, [])


def test_only_what_does_not_fit_is_cut() -> None:
    tokenizer = with_bos(tiny_tokenizer())
    question = Wording().ask(Question("t1 t2 t3", ("t4", "t5 t6"), 0), tokenizer)
    whole, truncated = encode(question, tokenizer, None)
    # BOS, "Question:", three words, "Answer:"; the last token is predicted and not read.
    assert [len(context) for context, _ in whole] == [6, 6]
    assert not truncated
    assert encode(question, tokenizer, 7) == (whole, False)
    cut, truncated = encode(question, tokenizer, 6)
    assert truncated
    assert cut == [whole[0], (whole[1][0][1:], [5, 6])]


def log_likelihoods(seed: int, scale: float, questions: int = 40) -> tuple[Tensor, Tensor]:
    """Of two to five choices each, the right one drawn as they say."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(questions, 5, generator=generator, dtype=torch.float64)
    values[torch.arange(5) >= torch.randint(2, 6, (questions, 1), generator=generator)] = -math.inf
    gold = torch.multinomial(values.softmax(1), 1, generator=generator)[:, 0]
    return scale * values, gold


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 50))
def test_the_fitted_temperature_has_the_least_loss(seed: int, scale: float) -> None:
    values, gold = log_likelihoods(seed, scale)

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(values / temperature, gold))

    found = fit_answer_temperature(values, gold)
    assert MIN_TEMPERATURE <= found <= MAX_TEMPERATURE
    for other in (*torch.logspace(-2, 4, 25).tolist(), 0.99 * found, 1.01 * found):
        assert loss(found) <= loss(other) + 1e-9 or other < MIN_TEMPERATURE or other > MAX_TEMPERATURE


def test_answers_that_are_better_the_less_likely_are_best_at_the_hottest() -> None:
    values, _ = log_likelihoods(0, 3.0)
    assert fit_answer_temperature(values, values.nan_to_num(neginf=1e9).argmin(1)) == pytest.approx(MAX_TEMPERATURE)
    assert fit_answer_temperature(values, values.argmax(1)) == pytest.approx(MIN_TEMPERATURE)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 20), st.floats(0.2, 20))
def test_the_matched_temperature_is_the_one_that_was_applied(seed: int, scale: float, temperature: float) -> None:
    values, _ = log_likelihoods(seed, scale)
    share = (values / temperature).softmax(1)
    entropy = float(torch.special.entr(share).sum(1).mean())
    assert match_answer_entropy(values, entropy) == pytest.approx(temperature, rel=1e-6)


def test_the_table_has_a_line_per_way_but_matched_temperatures() -> None:
    from confsteer.report.answer_tables import print_choices
    from confsteer.report.columns import TableConsole

    model, tokenizer, _, profile = planted("llama")
    steerings = [Steering(entropy=0.4), Steering(unigram=0.1)]
    (result,) = evaluate_choices(model, tokenizer, {"quiz": some_questions(12)}, profile, steerings)
    console = TableConsole(record=True, width=160, file=io.StringIO())
    print_choices(console, "tiny", result)
    text = console.export_text()
    assert "12 questions, 2 of them without their beginning" in text
    for row in result.rows:
        assert (row.name in text) == (row.kind != "matched temperature")


def test_a_chat_is_scored_as_the_template_renders_it() -> None:
    """A pass of the steered model over the rendered turns, to which no BOS is added, and the choice."""
    model, _, _, profile = planted("llama")
    tokenizer = with_bos(tiny_tokenizer())
    tokenizer.chat_template = "t90 {% for m in messages %}{{ m.content }} t91 {% endfor %}"
    questions = some_questions(4)[2:]
    sample = read_choices(Reader(model, profile), tokenizer, questions, wording=Wording("letters", chat=True))
    (ours,) = sample.log_likelihoods([Intervention.neutral(sample.reading.readout.n_neurons)])
    found = []
    for asked in sample.asked:
        context = tokenizer(asked.contexts[0], add_special_tokens=False)["input_ids"]
        assert context[0] == 90
        for continuation in asked.continuations:
            own = tokenizer(continuation, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([context + own]), use_cache=False).logits.log_softmax(dim=-1)[0]
            found.append(sum(float(log_p[len(context) - 1 + i, token]) for i, token in enumerate(own)))
    assert flat(ours) == pytest.approx(found, abs=1e-4)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_choice_as_in_lm_eval() -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, _ = demo.load()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    for prompt, choice in (("It was the best of ", "times"), ("It was the best of", " times, it was"), ("Answer:\n", "no")):
        ((ours,), _) = encode(Asked((prompt,), (choice,)), tokenizer, None)
        assert ours == theirs._encode_pair(prompt, choice)


def test_every_answer_can_be_written_and_gives_the_same_numbers(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="datasets brings pandas")
    model, tokenizer, _, profile = planted("llama")
    questions = [
        question._replace(id=f"q{i}", record={"subject": f"s{i % 3}", "confidence": "low"})
        for i, question in enumerate(some_questions(24, longest=8))
    ]
    (found,) = answer(Reader(model, profile), tokenizer, {"quiz": questions}, [Steering(entropy=0.4)], by="subject")
    rows = {row.name: row for row in found.comparison.rows}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found.records()))
    table = pandas.read_json(tmp_path / "a.jsonl", lines=True)
    assert set(table.way) == rows.keys() - {"chance"}
    assert list(table[table.way == "neutral"].id) == [f"q{i}" for i in range(24)]
    assert set(table.record_confidence) == {"low"}
    for way, answers in table.groupby("way"):
        assert answers.correct.mean() == pytest.approx(rows[way].metrics["accuracy"].value)
        confidence = torch.tensor(answers.confidence.to_numpy())
        right = torch.tensor(answers.correct.to_numpy())
        ece = calibration_metrics(confidence, right, Blocks(torch.arange(24)))["ece"].value
        assert ece == pytest.approx(rows[way].metrics["ece"].value, abs=1e-6)
    # Groups are the same table, grouped.
    grouped = found.comparison.grouped
    assert grouped is not None
    neutral = table[table.way == "neutral"].groupby("subject").correct.mean()
    assert {group.name: group.metrics[0]["accuracy"].value for group in grouped.groups} == pytest.approx(dict(neutral))
    assert grouped.macro[0]["accuracy"].value == pytest.approx(neutral.mean())
    with pytest.raises(CorpusError, match=r"quiz, question 1 has no field 'topic' to group by, .*: 'subject', 'confidence'"):
        next(answer(Reader(model, profile), tokenizer, {"quiz": questions}, [], by="topic"))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_a_conditional_logit_has_the_least_loss(seed: int) -> None:
    values, gold = log_likelihoods(seed, 1.0)
    inside = values > -math.inf
    other = torch.randn(*values.shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = torch.cat([values.masked_fill(~inside, 0)[..., None], other], dim=-1)

    def loss(weights: Tensor) -> float:
        return float(torch.nn.functional.cross_entropy((features @ weights).masked_fill(~inside, -math.inf), gold))

    found = fit_logit(features, inside, gold)
    assert found[0] >= 0
    for i in range(3):
        for step in (-0.1, 0.1):
            moved = found.clone()
            moved[i] += step
            assert loss(found) <= loss(moved) + 1e-4 or moved[0] < 0
    # Where the likeliest choices are wrong, a weight below zero would be best: it is zero.
    wrong = values.nan_to_num(neginf=1e9).argmin(dim=1)
    assert float(fit_logit(features, inside, wrong)[0]) == 0
