"""Answers in a model's own words, and five confidences in them."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from transformers import PreTrainedTokenizerFast

import confsteer
from confsteer import CorpusError, Steering, SteeringError
from confsteer.cli import main
from confsteer.evaluation.comparison import COVERAGES, accuracy_at_coverages
from confsteer.evaluation.confidences import (
    CONFIDENCES,
    TEMPERATURES,
    UNSTEERED,
    best_temperature,
    of_tokens,
    percentage,
    platt,
)
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.metrics import calibration_metrics
from confsteer.evaluation.reader import Reader
from confsteer.evaluation.run_file import Run
from confsteer.evaluation.written import WrittenAnswered, answer_in_words, compare_written
from confsteer.evaluation.written_sample import WrittenSample, WrittenWay, fitted, write_sample
from confsteer.report.columns import TableConsole, write_csv
from confsteer.report.page import render
from confsteer.report.results import read_result
from confsteer.report.written_findings import written_findings
from confsteer.report.written_tables import fitting_in_words, print_written, written_tables
from confsteer.results.bootstrap import Blocks
from confsteer.text.prompts import ShortWording
from confsteer.text.short_questions import ShortQuestion
from tests.models import tiny_tokenizer
from tests.planted import planted

LESS_CONFIDENT = Steering(entropy=0.4)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with the letters A and B for its last two words."""
    vocabulary = {"<eos>": 0} | {f"t{i}": i for i in range(1, 94)} | {"A": 94, "B": 95}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<eos>", eos_token="<eos>", unk_token="<eos>")


def tokens(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


@functools.cache
def answered() -> WrittenAnswered:
    """Sixteen questions to the planted Llama; every other answer of it is accepted, and one more number."""
    found = planted("llama")
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"t{i}" for i in torch.randint(1, 94, (n % 5 + 1,), generator=generator).tolist()) for n in range(16)]
    questions = [ShortQuestion(text, ("nothing",), id=f"q{i}", record={"way": "own"}) for i, text in enumerate(texts)]
    questions[3] = questions[3]._replace(kind="number", answers=("0",))
    reader = Reader(found.model, found.profile)
    (first,) = answer_in_words(reader, tokenizer(), {"quiz": questions}, [], samples=2)
    known = [
        question._replace(answers=(first.sample.ways[0].texts[i],)) if i % 2 else question for i, question in enumerate(questions)
    ]
    (second,) = answer_in_words(reader, tokenizer(), {"quiz": known}, [LESS_CONFIDENT], samples=4)
    assert second.sample.ways[0].texts == first.sample.ways[0].texts
    return second


def test_each_confidence_is_what_it_is_called() -> None:
    """Against passes of the steered model, one text at a time, over the prompts that the report shows."""
    model, _, _, profile = planted("llama")
    sample = answered().sample
    neutral, _, steered = sample.ways
    for steering, way in ((Steering(), neutral), (LESS_CONFIDENT, steered)):
        for i, question in enumerate(sample.questions[:4]):
            prompt, answer = tokens(f"Question: {question.question}\nAnswer:"), tokens(way.texts[i])
            with confsteer.steer(model, profile, steering), torch.no_grad():
                log_p = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
                of_answer = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
                if way.ended[i]:
                    of_answer = torch.cat([of_answer, log_p[-1, :1]])
                proposed = question.key(way.texts[i]) if question.kind == "number" else way.texts[i]
                about = f"Question: {question.question}\nProposed Answer: {proposed}\n"
                ending = "Is the proposed answer:\n (A) True\n (B) False\nThe proposed answer is:"
                log_q = model(torch.tensor([tokens(about + ending)]), use_cache=False).logits[0, -1].log_softmax(-1)
            assert float(way.confidence["sequence"][i].log()) == pytest.approx(float(of_answer.sum()), abs=1e-3)
            assert float(way.confidence["per_token"][i].log()) == pytest.approx(float(of_answer.mean()), abs=1e-4)
            assert float(way.confidence["p_true"][i]) == pytest.approx(float(log_q[[94, 95]].softmax(-1)[0]), abs=1e-5)
    # A share of four samples; the steered model is less sure of its tokens.
    for way in (neutral, steered):
        assert set(way.confidence["self_consistency"].tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    same = ~steered.changed
    assert bool((steered.confidence["sequence"][same] < neutral.confidence["sequence"][same]).all())


def test_a_chat_is_read_as_the_template_renders_it_and_what_does_not_fit_loses_its_beginning() -> None:
    model, _, _, profile = planted("llama")
    chat = tokenizer_of_chats()
    questions = [ShortQuestion("t1 t2", ("t3",)), ShortQuestion("t5 " * 80, ("t3",))]
    (found,) = answer_in_words(Reader(model, profile), chat, {"quiz": questions}, [], wording=ShortWording(chat=True), samples=2)
    assert found.comparison.truncated == 1
    assert found.comparison.wording == "own words, chat"
    assert found.sample.prompts["answer"].startswith("t90 Answer with a few words")
    for text in found.sample.prompts.values():
        assert text.endswith(" t91 ")
    (way, _), context = found.sample.ways, 64 - 32
    for i, question in enumerate(questions):
        asked = f"t90 Answer with a few words, without a sentence around them.\nQuestion: {question.question} t91 "
        prompt = chat(asked, add_special_tokens=False)["input_ids"][-context:]
        assert (len(prompt) == context) == (i == 1)
        answer = chat(way.texts[i], add_special_tokens=False)["input_ids"] + [0] * bool(way.ended[i])
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
        of_answer = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float(way.confidence["per_token"][i].log()) == pytest.approx(float(of_answer.mean()), abs=1e-4)


def tokenizer_of_chats() -> PreTrainedTokenizerFast:
    """One that puts a token of its own before every text, which a chat must not get twice."""
    chat = tiny_tokenizer()
    chat.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    chat.chat_template = "t90 {% for m in messages %}{{ m.content }} t91 {% endfor %}"
    return chat


def test_right_changed_and_cut_off_answers_are_counted() -> None:
    found = answered()
    neutral, fit, steered = found.sample.ways
    assert [one.name for one in found.comparison.answers] == ["neutral", "entropy=+0.4"]
    for i in range(1, 16, 2):
        assert neutral.correct[i] or neutral.empty[i]
    for ours, way in zip(found.comparison.answers, (neutral, steered), strict=True):
        assert ours.right == sum(q.accepts(text) for q, text in zip(found.sample.questions, way.texts, strict=True))
        changed = [q.key(a) != q.key(b) for q, a, b in zip(found.sample.questions, way.texts, neutral.texts, strict=True)]
        assert ours.changed == sum(changed)
        assert ours.right - found.comparison.answers[0].right == ours.became_right - ours.became_wrong
    # What is fitted leaves the answers.
    assert fit.texts == neutral.texts
    assert torch.equal(fit.correct, neutral.correct)


def test_metrics_are_those_of_the_answers_that_were_written() -> None:
    """The file of answers, read back: accuracy, ECE, Brier score, and AUROC with ties by torchmetrics."""
    found = answered()
    records = [json.loads(json.dumps(record, allow_nan=False)) for record in found.records()]
    assert len(records) == 3 * 16
    assert {record["record_way"] for record in records} == {"own"}
    for confidence in found.comparison.confidences:
        for row in confidence.rows:
            of_way = [r for r in records if r["way"] == row.name and r[confidence.confidence] is not None]
            assert len(of_way) == confidence.stated(row)
            if not of_way:
                continue
            stated = torch.tensor([r[confidence.confidence] for r in of_way], dtype=torch.float64)
            right = torch.tensor([r["correct"] for r in of_way])
            blocks = Blocks(torch.tensor([r["block"] for r in of_way]))
            for name, one in calibration_metrics(stated, right, blocks).items():
                assert row.metrics[name].value == pytest.approx(one.value)
            if 0 < int(right.sum()) < len(right):
                # Float64 and no rounding: torchmetrics sorts by confidence, and gives ties a half.
                assert row.metrics["auroc"].value == pytest.approx(float(binary_auroc(stated, right.long())))
            if row.kind == "steering" and "neutral" in row.minus and len(of_way) == 16:
                for name, difference in row.minus["neutral"].items():
                    assert difference.value == pytest.approx(row.metrics[name].value - confidence.rows[0].metrics[name].value)


def made_up(correct: Tensor, confidence: Tensor, steered: Tensor, changed: Tensor | None = None) -> WrittenSample:
    """Questions whose every confidence is the same, and a steering that has its own."""
    n = len(correct)
    same: Any = {name: confidence.double() for name in CONFIDENCES}
    log_p = [torch.stack([c.log() / t for t in TEMPERATURES])[:, None] for c in confidence.double()]
    no = torch.zeros(n, dtype=torch.bool)
    neutral = WrittenWay("neutral", "neutral", Steering(), ("x",) * n, ~no, no, correct, no, no, same, {})
    other: Any = {name: steered.double() for name in CONFIDENCES}
    turned = neutral._replace(name="entropy=+0.4", kind="steering", steering=LESS_CONFIDENT, confidence=other)
    turned = turned._replace(changed=no if changed is None else changed)
    questions = [ShortQuestion("Who?", ("x",))] * n
    prompts: Any = {"answer": "Who? <&>", "p_true": "Is it?", "verbalised": "How likely?"}
    ways = [neutral, fitted(neutral, log_p, torch.arange(n)), turned]
    return WrittenSample("quiz", "own words", questions, prompts, torch.arange(n), "questions", 0, 5, ways)


def overconfident(n: int = 200) -> WrittenSample:
    """Right half as often as it says; steered, it says what is right."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.02 + 0.96 * torch.rand(n, generator=generator)
    return made_up(torch.rand(n, generator=generator) < confidence / 2, confidence, confidence / 2)


def said(sample: WrittenSample) -> dict[str, str]:
    return {finding.question: finding.answer for finding in written_findings(compare_written(sample))}


@pytest.mark.parametrize("right", [False, True])
def test_where_all_answers_are_alike_nothing_is_said_of_confidence(right: bool) -> None:
    n = 40
    sample = made_up(torch.full((n,), right), torch.linspace(0.1, 0.9, n), torch.linspace(0.2, 0.8, n))
    compared = compare_written(sample)
    assert all("auroc" not in row.metrics for one in compared.confidences for row in one.rows)
    found = written_findings(compared)
    assert [one.question for one in found] == ["Does the model give the answers?", "What does steering do to the answers?"]
    assert found[0].answer == ("To all of these questions." if right else "To none of these questions.")
    assert "there is no AUROC" in found[0].lead


def test_findings_of_a_planted_overconfidence() -> None:
    found = said(overconfident())
    assert found["Which confidence tells right from wrong?"] == f"Beyond the interval: {', '.join(CONFIDENCES.values())}."
    for label in CONFIDENCES.values():
        assert found[f"{label}: is it better calibrated with steering?"].startswith("Its ECE is lower, by 0.")
    assert found["What does steering do to the answers?"].startswith("It changes 0 of 200; accuracy: no difference")
    # The other way round, and confidences that say nothing.
    sample = overconfident()
    worse = sample.ways[2]._replace(confidence={name: torch.full((200,), 0.99).double() for name in CONFIDENCES})
    found = said(sample._replace(ways=[*sample.ways[:2], worse]))
    assert found["P(True): is it better calibrated with steering?"].startswith("No: its ECE is higher, by 0.")
    correct = torch.rand(200, generator=torch.Generator().manual_seed(3)) < 0.3
    found = said(made_up(correct, torch.full((200,), 0.5), torch.full((200,), 0.5)))
    assert found["Which confidence tells right from wrong?"] == "None, beyond the interval."
    assert found["per token: is it better calibrated with steering?"].startswith("Not shown")


def test_a_confidence_that_was_not_stated_is_left_out_and_counted() -> None:
    sample = overconfident(100)
    for way in sample.ways:
        way.confidence["verbalised"] = way.confidence["verbalised"].clone()
    neutral, _, steered = sample.ways
    neutral.confidence["verbalised"][:30] = math.nan
    steered.confidence["verbalised"][20:60] = math.nan
    compared = compare_written(sample)
    (one,) = [one for one in compared.confidences if one.confidence == "verbalised"]
    assert [one.stated(row) for row in one.rows] == [70, 100, 60]
    # Both are stated for the last forty only.
    ours, theirs = (way.confidence["verbalised"][60:] - way.correct[60:].double() for way in (steered, neutral))
    assert one.rows[2].minus["neutral"]["brier"].value == pytest.approx(float((ours**2).mean() - (theirs**2).mean()))
    lead = next(f for f in written_findings(compared) if "tells right" in f.question)
    assert any("stated for 70 of 100 answers" in phrase for phrase in lead.differences[0].phrases)
    nowhere = neutral._replace(confidence=neutral.confidence | {"verbalised": torch.full((100,), math.nan).double()})
    compared = compare_written(sample._replace(ways=[nowhere, *sample.ways[1:]]))
    (one,) = [one for one in compared.confidences if one.confidence == "verbalised"]
    assert (one.rows[0].metrics, one.rows[0].reliability) == ({}, ())
    assert any(
        "verbalised: no AUROC, stated for 0" in p for f in written_findings(compared) for d in f.differences for p in d.phrases
    )


def test_confidences_of_tokens() -> None:
    log_p = [torch.log(torch.tensor([[0.5, 0.5, 0.25], [0.4, 0.4, 0.3]])), torch.log(torch.tensor([[0.1], [0.2]]))]
    found = of_tokens(log_p)
    assert torch.allclose(found["sequence"], torch.tensor([[0.0625, 0.1], [0.048, 0.2]], dtype=torch.float64))
    assert float(found["per_token"][0, 0]) == pytest.approx(0.0625 ** (1 / 3))
    assert TEMPERATURES[UNSTEERED] == 1


def test_percentages() -> None:
    texts = ("85%", "about 85 percent", "0.85", ".85", "85", "1", "1.0", "100%", "0", "120%", "sure", "0.5%")
    shares = (0.85, 0.85, 0.85, 0.85, 0.85, 0.01, 1, 1, 0, math.nan, math.nan, 0.005)
    assert [percentage(text) for text in texts] == pytest.approx(shares, nan_ok=True)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_what_is_fitted_has_the_least_loss_on_the_other_half(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 60
    confidence = 0.05 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
    correct = torch.rand(n, generator=generator) < confidence**2
    block, odd = torch.arange(n), torch.arange(n) % 2 == 1

    def loss(probability: Tensor) -> float:
        return float(torch.nn.functional.binary_cross_entropy(probability, correct[odd].double()))

    # The even questions are judged by what fits the odd ones.
    at = torch.stack([confidence ** (1 / t) for t in TEMPERATURES])
    found = best_temperature(at, correct, block)
    losses = [loss(at[i, odd]) for i in range(len(TEMPERATURES))]
    best = losses.index(min(losses))
    assert found.values[0] == TEMPERATURES[best]
    assert torch.equal(found.confidence[~odd], at[best, ~odd])
    mapped = platt(confidence, correct, block)
    slope, constant = mapped.values[:2]
    assert torch.allclose(mapped.confidence[~odd], (slope * confidence.logit() + constant).sigmoid()[~odd])
    here = loss((slope * confidence.logit() + constant).sigmoid()[odd])
    for a, b in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
        moved = max(0.0, slope + a), constant + b
        assert here <= loss((moved[0] * confidence.logit() + moved[1]).sigmoid()[odd]) + 1e-4


def test_risk_does_not_depend_on_the_order_of_equal_confidences() -> None:
    confidence, correct = torch.tensor([0.5] * 10 + [0.9] * 10), torch.arange(20) % 4 == 0
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    found = accuracy_at_coverages(confidence, correct)
    assert found == pytest.approx(accuracy_at_coverages(confidence[order], correct[order]))
    ahead = int(correct[10:].sum()) / 10
    assert found[COVERAGES.index(0.25)] == pytest.approx(ahead)
    assert found[-1] == pytest.approx(float(correct.double().mean()))


def test_a_temperature_at_an_end_of_the_search_is_said_to_be_one() -> None:
    row = compare_written(overconfident(60)).confidences[0].rows[1]
    low, inner, high = TEMPERATURES[0], TEMPERATURES[3], TEMPERATURES[-1]
    said = {
        (low, high): "T = 0.10, the lowest tried; T = 31.62, the highest tried",
        (inner, high): "T = 0.20; T = 31.62, the highest tried",
        (inner, inner): "T = 0.20",
    }
    for values, words in said.items():
        assert fitting_in_words("sequence", row.model_copy(update={"values": values})) == words


def test_the_report_and_the_table_have_every_way_and_every_prompt() -> None:

    compared = compare_written(overconfident(60))
    result = Evaluation(model="m", profile="p", versions={}, texts=(), written=(compared,))
    assert Evaluation.model_validate_json(result.model_dump_json()) == result
    page = render(result, None)
    for text in (
        "<h1>Evaluation of m</h1>",
        "Who? &lt;&amp;&gt;",
        "Is it?",
        "How likely?",
        "sequence probability, neutral",
        "P(True), entropy=+0.4",
    ):
        assert text in page
    for one in compared.confidences:
        for row in one.rows:
            assert f"{row.metrics['ece'].value:.4f}" in page
        assert fitting_in_words(one.confidence, one.rows[1]) in page
    console = TableConsole(record=True, width=100, file=io.StringIO())
    print_written(console, "tiny", compared)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown
    for words in (*CONFIDENCES.values(), "entropy=+0.4", "60 questions", f"{compared.answers[0].right}"):
        assert words in shown
    written = io.StringIO()
    write_csv(written, written_tables(compared))
    records = [*csv.DictReader(io.StringIO(written.getvalue()))]
    assert [int(record["right"]) for record in records[: len(compared.answers)]] == [one.right for one in compared.answers]
    of_confidences = [row for one in compared.confidences for row in one.rows]
    assert [float(record["ece"]) for record in records[len(compared.answers) :]] == [
        row.metrics["ece"].value for row in of_confidences
    ]


def test_what_cannot_be_answered_is_refused_before_the_model_runs() -> None:
    found = planted("llama")
    reader = Reader(found.model, found.profile)
    questions = [ShortQuestion("t1", ("t2",)), ShortQuestion("t3", ("t2",))]
    with pytest.raises(CorpusError, match=r"quiz: 1 questions \(1 questions\); .* give two or more"):
        next(answer_in_words(reader, found.tokenizer, {"quiz": questions[:1]}, []))
    with pytest.raises(SteeringError, match="out of reach"):
        next(answer_in_words(reader, found.tokenizer, {"quiz": questions}, [Steering(entropy=50.0)]))
    with pytest.raises(SteeringError, match="positions"):
        next(answer_in_words(reader, found.tokenizer, {"quiz": questions}, [Steering(positions="generated")]))
    with pytest.raises(CorpusError, match="no chat template"):
        next(answer_in_words(reader, found.tokenizer, {"quiz": questions}, [], wording=ShortWording(chat=True)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    planted("llama").save(folder)
    lines = [{"question": f"t{i} t{i + 1}", "answers": ["t1", f"t{i}"]} for i in range(1, 7)]
    for name in ("one.jsonl", "two.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_command_keeps_what_was_done_when_it_is_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from confsteer.evaluation import written

    whole = write_sample

    def until_two(*args: Any, source: str, **how: Any) -> WrittenSample:
        if source == "two.jsonl":
            raise KeyboardInterrupt
        return whole(*args, source=source, **how)

    monkeypatch.setattr(written, "write_sample", until_two)
    out = [str(folder / name) for name in ("out.json", "out.html", "answers.jsonl")]
    asked = ["--questions", str(folder / "one.jsonl"), "--questions", str(folder / "two.jsonl")]
    options = ["-s", "entropy=0.2", "--samples", "2", "--limit", "4", "--json", out[0], "--report", out[1], "--answers", out[2]]
    ran = CliRunner().invoke(main, ["eval", str(folder / "model"), "-p", str(folder / "profile"), *asked, *options])
    assert ran.exit_code == 130, ran.output
    result = read_result(Path(out[0]))
    assert isinstance(result, Evaluation)
    (kept,) = result.written
    assert (kept.source, kept.questions, kept.samples) == ("one.jsonl", 4, 2)
    assert len(Path(out[2]).read_text().splitlines()) == 4 * 3
    assert "one.jsonl (own words)" in Path(out[1]).read_text()
    assert "Interrupted" in ran.output


def test_options_that_do_not_go_together_are_a_sentence(folder: Path) -> None:
    command = ["eval", str(folder / "model"), "-p", str(folder / "profile"), "--questions", str(folder / "one.jsonl")]
    ran = CliRunner().invoke(main, [*command, "--format", "letters"])
    assert ran.exit_code == 2
    assert "--format is for multiple-choice questions" in ran.output
    ran = CliRunner().invoke(main, [*command, "--choices", "c.jsonl", "--shots", str(folder / "two.jsonl")])
    assert "ask one of them at a time" in ran.output
    run_file = folder / "run.yaml"
    run_file.write_text("model: model\nprofile: profile\nquestions: [one.jsonl]\nsamples: 3\n")
    settings = Run.read(run_file)
    assert settings.questions[0].path == folder / "one.jsonl"
    assert [question.answers for question in settings.short_questions()["one.jsonl"]][:2] == [("t1",), ("t1", "t2")]
    assert settings.samples == 3
