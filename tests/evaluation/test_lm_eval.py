from __future__ import annotations

import functools
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import confsteer
from confsteer import Profile, ProfileMismatchError, ProfileNotFoundError, Steering, SteeringError
from confsteer.cli import main
from confsteer.errors import ConfsteerError, LoadError
from confsteer.evaluation.lm_eval_model import SteeredLM
from confsteer.evaluation.lm_eval_samples import calibrations
from confsteer.evaluation.reader import Reader
from confsteer.evaluation.written import answer_in_words
from confsteer.model.loading import load_model
from confsteer.text.short_questions import read_short_questions
from tests.model.gguf_files import write
from tests.planted import planted

STEERING = "entropy=0.5 scale.20=0"
CHOICE_TASKS = ("several", "inputs", "judged", "words", "mutual")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model on disk, its profile, and tasks of lm-eval over a file of questions."""
    root = tmp_path_factory.mktemp("lm_eval")
    planted("llama").save(root)
    planted("gpt2").profile.save(root / "another")
    generator = random.Random(0)
    questions = []
    for _ in range(40):
        words = [f"t{i}" for i in generator.sample(range(1, 96), 40)]
        choices = [" ".join(words[20 + 4 * i : 20 + 4 * i + generator.randint(1, 3)]) for i in range(generator.randint(2, 5))]
        right = generator.randrange(len(choices))
        questions.append(
            {"question": " ".join(words[: generator.randint(3, 20)]), "choices": choices, "right": right}
            | {"answer": choices[right], "rights": [0, right], "index": str(right)}
        )
    (root / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    choice = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices"}
    accuracy = {"metric_list": [{"metric": "acc"}]}
    tasks: dict[str, dict[str, Any]] = {
        "words": choice | accuracy | {"doc_to_target": "answer"},
        "mutual": choice | {"doc_to_target": "right", "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]},
        "several": choice | accuracy | {"doc_to_target": "rights"},
        "inputs": choice | accuracy | {"doc_to_text": "right", "doc_to_target": "question"},
        "judged": choice | accuracy | {"doc_to_target": "right", "process_results": "!function judge.judge"},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "question"}
        | {"metric_list": [{"metric": "word_perplexity"}]},
        "continue": {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer"}
        | {"generation_kwargs": {"max_gen_toks": 8, "until": ["\n"]}, "metric_list": [{"metric": "exact_match"}]},
    }
    (root / "tasks").mkdir()
    (root / "tasks" / "judge.py").write_text("def judge(doc, results):\n    return {'acc': 1.0}\n")
    data: dict[str, Any] = {"dataset_path": "json", "test_split": "train"}
    data |= {"dataset_kwargs": {"data_files": str(root / "questions.jsonl"), "cache_dir": str(root / "cache")}}
    for name, task in tasks.items():
        text = yaml.safe_dump({"task": name, **data, **task}).replace("'!function judge.judge'", "!function judge.judge")
        (root / "tasks" / f"{name}.yaml").write_text(text)
    return root


def evaluate(root: Path, model: str | SteeredLM, *tasks: str, **model_args: Any) -> Any:
    model_args = {"pretrained": str(root / "model"), "device": "cpu", **model_args}
    manager = TaskManager(include_path=str(root / "tasks"), include_defaults=False)
    arguments = {"model_args": model_args, "batch_size": 4} if isinstance(model, str) else {}
    return lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **arguments)


def answers(results: Any) -> dict[str, list[Any]]:
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def steered_model(root: Path, **settings: Any) -> SteeredLM:
    given: dict[str, Any] = {"profile": str(root / "profile"), "steering": STEERING, "device": "cpu", "batch_size": 4}
    return SteeredLM(str(root / "model"), **(given | settings))


def test_neutral_gives_lm_evals_own_numbers(root: Path) -> None:
    tasks = ("mutual", "text", "continue")
    own = answers(evaluate(root, "hf", *tasks))
    assert answers(evaluate(root, "confsteer", *tasks, profile=str(root / "profile"))) == own
    assert answers(evaluate(root, "confsteer", *tasks)) == own
    assert answers(evaluate(root, "confsteer", *tasks, profile=str(root / "profile"), steering={"entropy": 0.5})) != own


def test_a_gguf_file_is_its_dequantised_model(root: Path) -> None:
    file = write(root / "tiny.gguf", planted("llama").model)
    written = load_model(str(file), device="cpu")
    whole = evaluate(root, SteeredLM(written.model, tokenizer=written.tokenizer, batch_size=4), "words")
    by_path = evaluate(root, SteeredLM(str(file), device="cpu", dtype="float32", batch_size=4), "words")
    in_folder = evaluate(root, SteeredLM(str(root), gguf_file="tiny.gguf", device="cpu", batch_size=4), "words")
    assert answers(by_path) == answers(in_folder) == answers(whole)
    with pytest.raises(LoadError, match="peft=adapter is no way to load a GGUF file"):
        SteeredLM(str(file), peft="adapter")


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_answers_are_those_of_the_steered_model(root: Path, batch_size: int | str) -> None:
    results = evaluate(root, steered_model(root, batch_size=batch_size), "words", "text", "continue")
    model: Any = AutoModelForCausalLM.from_pretrained(root / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "model")
    profile = Profile.load(root / "profile")

    @torch.no_grad()
    def log_likelihood(context: str, continuation: str) -> float:
        ids = tokenizer(f"{context} {continuation}", return_tensors="pt")["input_ids"]
        log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(log_p[-len(continuation.split()) :].sum())

    with confsteer.steer(model, profile, entropy=0.5, scale={20: 0.0}):
        for sample in results["samples"]["words"]:
            by_hand = [log_likelihood(*request) for request in sample["arguments"]]
            assert [response[0][0] for response in sample["resps"]] == pytest.approx(by_hand, abs=1e-4)
        for sample in results["samples"]["text"]:
            assert sample["resps"][0][0] == pytest.approx(log_likelihood("<eos>", sample["arguments"][0][0]), abs=1e-4)
        for sample in results["samples"]["continue"]:
            inputs = tokenizer(sample["arguments"][0][0], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert sample["resps"][0][0] == tokenizer.decode(ids).partition("<eos>")[0]


def test_the_model_is_restored_whatever_happens(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hooks(lm: SteeredLM) -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in lm.model.modules())

    lm = steered_model(root)
    own = HFLM(str(root / "model"), device="cpu")
    ids = torch.arange(1, 21)[None]
    assert hooks(lm) == 0
    steered: list[int] = []

    def fail(self: SteeredLM, *args: Any, **kwargs: Any) -> None:
        steered.append(hooks(lm))
        raise KeyboardInterrupt

    for task in ("words", "text", "continue"):
        evaluate(root, lm, task)
        with monkeypatch.context() as patch:
            patch.setattr(HFLM, "_model_call", fail)
            patch.setattr(HFLM, "_model_generate", fail)
            with pytest.raises(KeyboardInterrupt):
                evaluate(root, lm, task)
        assert hooks(lm) == 0
        assert torch.equal(lm._model_call(ids), own._model_call(ids))
    assert steered == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"steering": "heat=1"}, SteeringError, "unknown key 'heat'"),
        ({"steering": "entropy=9"}, SteeringError, "is out of reach"),
        ({"steering": "preset=calm"}, SteeringError, "preset 'calm': not in the profile"),
        ({"profile": None}, SteeringError, "steering entropy=+0.5 scale.20=0 needs the model's profile: give profile=PROFILE"),
        ({"profile": "{root}/nothing"}, ProfileNotFoundError, "no profile"),
        ({"profile": "{root}/another"}, ProfileMismatchError, "the profile is of"),
        ({"pretrained": "{root}/nothing"}, ConfsteerError, "cannot load"),
    ],
)
def test_a_wrong_argument_is_a_sentence(root: Path, settings: dict[str, Any], error: type[Exception], sentence: str) -> None:
    filled = {name: value.format(root=root) if value else value for name, value in settings.items()}
    with pytest.raises(error, match=re.escape(sentence)):
        evaluate(root, "confsteer", "words", **({"profile": str(root / "profile"), "steering": STEERING} | filled))


@pytest.mark.parametrize("positions", ["generated", "after:t3"])
def test_given_answers_cannot_be_steered_as_generated_ones(root: Path, positions: str) -> None:
    lm = steered_model(root, steering=f"entropy=0.5 positions={positions}")
    for task in ("words", "text"):
        with pytest.raises(SteeringError, match=f"positions={positions} steers what is generated"):
            evaluate(root, lm, task)
    assert evaluate(root, lm, "continue")["samples"]


def test_calibration_is_that_of_a_loop_over_the_questions(root: Path) -> None:
    results = evaluate(root, steered_model(root), *CHOICE_TASKS, "text")
    rows = {row.task: row for row in calibrations(results)}
    assert set(rows) == set(CHOICE_TASKS)
    questions = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    for task in ("words", "mutual"):
        bins: dict[int, list[tuple[float, bool]]] = {}
        for sample, question in zip(results["samples"][task], questions, strict=True):
            assert sample["doc"] == question
            p = [2.718281828459045 ** sample["resps"][i][0][0] for i in range(len(question["choices"]))]
            top = p.index(max(p))
            bins.setdefault(int(15 * max(p) / sum(p)), []).append((max(p) / sum(p), top == question["right"]))
        ece = sum(abs(sum(confidence - right for confidence, right in members)) for members in bins.values()) / len(questions)
        assert len(bins) > 3
        assert rows[task].metrics["ece"].value == pytest.approx(ece, abs=1e-6)
        assert rows[task].metrics["accuracy"].value == pytest.approx(results["results"][task]["acc,none"])
        assert (rows[task].n, rows[task].left_out) == (40, 0)
    for task in ("several", "inputs", "judged"):
        assert rows[task] == (task, 0, 40, {})


@pytest.fixture
def only_local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's command line lists its thousands of tasks first, which takes seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


def command(root: Path, *options: object, code: int = 0) -> Result:
    common = ("--include_path", root / "tasks", "--device", "cpu", "--limit", 12)
    result = CliRunner().invoke(main, [str(word) for word in ("lm-eval", *common, *options)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.usefixtures("only_local_tasks")
def test_the_command_prints_and_writes_calibration_beside_lm_evals_results(root: Path, tmp_path: Path) -> None:
    argv = list(sys.argv)
    model_args = (f"pretrained={root}/model,profile={root}/profile", f"steering={STEERING}")
    result = command(root, "--tasks", "words,several", "--model_args", *model_args, "--output_path", tmp_path / "out")
    assert sys.argv == argv
    (written,) = (tmp_path / "out").glob("*/calibration_*.json")
    assert written.with_name(written.name.replace("calibration", "results")).exists()
    assert not list(tmp_path.rglob("samples_*"))
    rows = json.loads(written.read_text())
    assert {task: (row["n"], row["left_out"]) for task, row in rows.items()} == {"words": (12, 0), "several": (0, 12)}
    assert f"{rows['words']['metrics']['ece'][0]:.4f}" in result.output
    assert str(written) in result.output.replace("\n", "")
    as_json = json.dumps(
        {"pretrained": f"{root}/model", "profile": f"{root}/profile", "steering": {"entropy": 0.5, "scale": {"20": 0}}}
    )
    arguments = ("--tasks", "words", "--model_args", as_json, "--output_path", tmp_path / "r.json", "--log_samples")
    command(root, *arguments)
    (again,) = tmp_path.glob("calibration_*.json")
    assert json.loads(again.read_text())["words"] == rows["words"]
    assert len(list(tmp_path.glob("samples_words_*"))) == 1


@pytest.mark.usefixtures("only_local_tasks")
def test_what_a_task_that_generates_logged_is_asked_and_answered_as_it_was(root: Path, tmp_path: Path) -> None:
    model_args = f"pretrained={root}/model,profile={root}/profile,steering={STEERING}"
    command(root, "--tasks", "continue", "--model_args", model_args, "--output_path", tmp_path / "r.json", "--log_samples")
    (file,) = tmp_path.glob("samples_continue_*")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    questions = read_short_questions([file])
    assert [question.answers for question in questions] == [(sample["doc"]["answer"],) for sample in logged]
    found, tokenizer = planted("llama"), load_model(f"{root}/model").tokenizer
    reader = Reader(found.model, found.profile)
    (ours,) = answer_in_words(reader, tokenizer, {"logged": questions}, [Steering.parse(STEERING)], samples=2)
    for text, sample in zip(ours.sample.ways[2].texts, logged, strict=True):
        # lm-eval asked for 8 tokens at most.
        assert text.split()[:8] == sample["resps"][0][0].split()[:8]


@pytest.mark.usefixtures("only_local_tasks")
def test_the_commands_errors_are_sentences(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_args = (f"pretrained={root}/model", f"profile={root}/profile", "steering=entropy=9")
    result = command(root, "--tasks", "words", "--model_args", *model_args, code=1)
    assert "Error: entropy=" in result.output
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "confsteer.evaluation.lm_eval_model")
    assert "pip install 'confsteer[lm-eval]'" in command(root, "--tasks", "words", code=1).output
