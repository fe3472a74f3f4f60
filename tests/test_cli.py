from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import confsteer
from confsteer import CorpusError, Profile, SettingError
from confsteer.cli import main
from confsteer.cli.options import EXIT_INTERRUPTED, EXIT_NO_NEURONS, EXIT_NOTHING_GAINED
from confsteer.evaluation.choice_sample import ChoiceSample, read_choices
from confsteer.evaluation.evaluate import Evaluation
from confsteer.evaluation.run_file import Run
from confsteer.studies.cumulative import CumulativeStudy
from confsteer.studies.induction import InductionStudy
from confsteer.text.windows import make_windows
from confsteer.tuning.tune import Tuning
from confsteer.tuning.tune_answers import AnswerTuning
from tests.models import ENTROPY_NEURONS, FAMILIES, chat_tokenizer, tiny_model, tiny_tokenizer, zipf_texts
from tests.planted import planted


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted model on disk with its profile and some text."""
    root = tmp_path_factory.mktemp("cli")
    found = planted("llama")
    found.save(root)
    (root / "text.txt").write_text("\n".join(found.texts))
    (root / "other.txt").write_text("\n".join(zipf_texts(4, 150, seed=4)))
    np.save(root / "few.npy", np.array([1, 2, 3]))
    turns = [{"role": "user", "content": text} for text in found.texts]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": [turn]}) + "\n" for turn in turns))
    return root


def test_calibrate_finds_saves_and_prints(folder: Path, tmp_path: Path) -> None:
    result = run("calibrate", folder / "model", "--text", folder / "text.txt", "--window", 64, "--out", tmp_path / "p")
    profile = Profile.load(tmp_path / "p")
    assert {n.index: n.sign for n in profile.entropy_neurons} == ENTROPY_NEURONS
    assert profile.corpus
    assert profile.corpus.source == "text.txt"
    for neuron in (*profile.entropy_neurons, *profile.frequency_neurons):
        assert f"{neuron.layer}.{neuron.index}" in result.output
    assert "Entropy neurons" in result.output
    assert str(tmp_path / "p") in result.output.replace("\n", "")


def test_count_makes_what_calibrate_takes(folder: Path, tmp_path: Path) -> None:
    corpus = [" ".join(f"t{i}" for i in range(first, 92)) for first in range(1, 92)]
    (tmp_path / "corpus.json").write_text(json.dumps([{"body": text} for text in corpus]))
    arguments = ("--text", tmp_path / "corpus.json", "--field", "body", "--out", tmp_path / "counts.npy")
    result = run("count", folder / "model", *arguments)
    assert np.load(tmp_path / "counts.npy").tolist() == [0, *range(1, 92), 0, 0, 0, 0]
    assert f"corpus.json: {91 * 92 // 2:,} tokens. 91 of the tokenizer's 96 occur" in result.output
    text = ("--text", folder / "text.txt", "--window", 64, "--out", tmp_path / "p")
    assert "too few" not in run("calibrate", folder / "model", *text, "--unigram", tmp_path / "counts.npy").output
    profile = Profile.load(tmp_path / "p")
    assert profile.corpus
    assert profile.corpus.unigram_sha256 in result.output
    assert "give some text" in run("count", folder / "model", "--out", tmp_path / "counts.npy", code=2).output


def test_calibrate_without_text_samples_it_and_says_so(folder: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", folder / "model", "--window", 64, "--tokens", 2000, "--seed", 7)
    result = run(*arguments, "--out", tmp_path / "p")
    assert "No text given: the model writes its own, 2,000 tokens sampled at temperature 1 (seed 7)." in result.output
    corpus = Profile.load(tmp_path / "p").corpus
    assert corpus
    assert corpus.source == "text sampled from the model itself (seed 7)"


def test_calibrate_on_conversations(folder: Path, tmp_path: Path) -> None:
    planted("llama").model.save_pretrained(tmp_path / "model")
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ("--text", folder / "chats.jsonl", "--chat", "--window", 64, "--out", tmp_path / "p")
    run("calibrate", tmp_path / "model", *arguments)
    corpus = Profile.load(tmp_path / "p").corpus
    assert corpus
    served = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()]
    assert corpus.sha256 == make_windows(served, tokenizer, window=64).sha256
    assert corpus.source == "chats.jsonl (conversations)"


def test_windows_cross_documents_where_asked(folder: Path, tmp_path: Path) -> None:
    texts = zipf_texts(40, 30)
    (tmp_path / "texts.json").write_text(json.dumps([{"body": text} for text in texts]))
    arguments = ("--text", tmp_path, "--field", "body", "--join", "--window", 64, "--out", tmp_path / "p")
    run("calibrate", folder / "model", *arguments)
    corpus = Profile.load(tmp_path / "p").corpus
    assert corpus
    assert corpus.tokens == 40 * 30 + 39
    assert corpus.windows == -(-corpus.tokens // 64)


def test_a_dataset_is_a_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in zipf_texts()))
    arguments = ("--dataset", tmp_path / "data", "--split", "test", "--window", 64, "--out", tmp_path / "p")
    result = run("calibrate", folder / "model", *arguments)
    corpus = Profile.load(tmp_path / "p").corpus
    assert corpus
    assert corpus.source == "dataset data test"
    assert result.output.startswith("Warning: 960 tokens of text are too few to rank the tokenizer's 96 by frequency")
    assert "UserWarning" not in result.output


def test_calibrate_says_so_when_there_is_nothing(tmp_path: Path, folder: Path) -> None:
    model = tiny_model(*next(f for f in FAMILIES if f.model_type == "llama"))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("calibrate", tmp_path / "model", "--text", folder / "text.txt", "--window", 64, "--out", tmp_path / "p")
    result = run(*arguments, code=EXIT_NO_NEURONS)
    assert "Entropy neurons: none found. An entropy dial is then made by hand: confsteer calibrate --null-direction." in " ".join(
        result.output.split()
    )
    assert Profile.load(tmp_path / "p").entropy_neurons == ()
    steered = run("generate", "t1 t2", tmp_path / "model", "-p", tmp_path / "p", "-s", "entropy=0.1", code=1)
    assert "there is nothing to steer. confsteer calibrate --null-direction makes an entropy dial by hand" in steered.output


@pytest.mark.parametrize(
    ("cliff", "said"),
    [(1.004, "has no clear end: the next singular value is 1.00"), (1170.3, "ends at a cliff: the next singular value is 1,170")],
)
def test_a_cliff_is_read_without_an_exponent(folder: Path, cliff: float, said: str) -> None:
    profile = Profile.load(folder / "profile")
    layer = profile.layer.model_copy(update={"cliff": cliff})
    profile.model_copy(update={"layer": layer}).save(folder / "cliff")
    assert f"The null space {said} times as large." in " ".join(run("show", folder / "cliff").output.split())


def test_show_prints_and_draws(folder: Path, tmp_path: Path) -> None:
    result = run("show", folder / "profile", "--plot", tmp_path / "n.png", "--response", tmp_path / "r.png")
    assert "1.11" in result.output
    for file in (tmp_path / "n.png", tmp_path / "r.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_generate_shows_each_steering(folder: Path) -> None:
    model, profile = folder / "model", folder / "profile"
    result = run(
        "generate", "t3 t5", model, "-p", profile, "-s", "entropy=-0.5", "-s", '{"entropy": 0.5}', "--max-new-tokens", 20
    )
    assert "neutral" in result.output
    assert "entropy=-0.5" in result.output
    assert "entropy=+0.5" in result.output


def test_generate_answers_through_the_chat_template_and_names_what_is_empty(folder: Path, tmp_path: Path) -> None:
    model, note = planted("llama").model, "--no-chat continues it as it stands"
    model.save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("generate", "t3 t5", tmp_path / "model", "-p", folder / "profile", "--max-new-tokens", 5, "--temperature", 0)
    answered, continued = run(*arguments).output, run(*arguments, "--no-chat").output
    assert note in answered
    assert note not in continued
    assert answered.replace(note, "") != continued
    assert "(ended at once)" not in answered + continued
    # Nothing is left to generate but EOS.
    settings = {"eos_token_id": 0, "suppress_tokens": [*range(1, 96)]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    assert "(ended at once)" in run(*arguments).output
    assert "no chat template" in run("generate", "t3", folder / "model", "-p", folder / "profile", "--chat", code=1).output


def test_eval_compares_and_writes_json_and_a_picture(folder: Path, tmp_path: Path) -> None:
    result = run(
        "eval", folder / "model", "-p", folder / "profile", "--text", folder / "other.txt", "--window", 64,
        "-s", "entropy=0.3", "-s", "scale.entropy=0", "--json", tmp_path / "e.json", "--plot", tmp_path / "e.png",
    )  # fmt: skip
    assert "scale.entropy=0" in result.output
    document = json.loads((tmp_path / "e.json").read_text())
    rows = document["texts"][0]["rows"]
    (unsteered,), (raised, _) = ([row for row in rows if row["kind"] == kind] for kind in ("neutral", "steering"))
    assert raised["metrics"]["entropy"][0] > unsteered["metrics"]["entropy"][0]
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["calibrate", "{model}", "--split", "train"], 2, "--config and --split go with --dataset"),
        (["calibrate", "{model}", "--chat"], 2, "--field, --chat and --join go with --text or --dataset"),
        (["calibrate", "{model}", "--text", "{text}", "--chat"], 1, "conversations are read from .json, .jsonl, .ndjson"),
        (["calibrate", "{model}", "--text", "{chats}", "--chat"], 1, "the tokenizer has no chat template"),
        (["calibrate", "{model}", "--text", "{chats}"], 1, "chats.jsonl, line 1 has no field 'text'; it has 'messages'"),
        (["eval", "{model}", "-p", "{profile}"], 2, "give some text: --text PATH or --dataset HUB_ID"),
        (["calibrate", "{model}", "--text", "{text}", "--dataset", "x/y"], 2, "not both"),
        (["calibrate", "{model}", "--text", "{text}", "--window", "4"], 1, "a window of 4 tokens is too short; use at least 8"),
        (["calibrate", "{model}", "--text", "{text}", "--window", "65"], 1, "does not fit the model's context of 64"),
        (["calibrate", "{model}", "--text", "{text}", "--window", "64", "--null-dims", "99"], 1, "must be between 1 and 31"),
        (["calibrate", "{model}", "--text", "{text}", "--tokens", "0"], 2, "0 is not in the range x>=1"),
        (["calibrate", "{model}", "--text", "{text}", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["calibrate", "{model}", "--text", "missing.txt"], 1, "missing.txt: No such file"),
        (["calibrate", "{root}/nothing", "--text", "{text}"], 1, "cannot load"),
        (["show", "{root}/nothing"], 1, "no profile"),
        (["show", "{model}"], 1, "has no profile.json"),
        (["eval", "{model}", "--text", "{text}"], 2, "give a profile, -p PROFILE, or a run file"),
        (["eval", "{model}", "-p", "{profile}", "--text", "{text}", "--sweep", "entropy=1"], 1, "KEY=FIRST:LAST:NUMBER"),
        (["eval", "{model}", "--run", "x.yaml"], 2, "--run FILE says what to run"),
        (["eval", "--run", "x.yaml", "--tokens", "5"], 2, "--run FILE says what to run, --tokens too"),
        (["eval", "{model}", "-p", "{profile}", "--text", "{text}", "--plot", "x.foo"], 2, "a picture's name ends in .png"),
        (["eval", "{model}", "-p", "{profile}", "--text", "{text}", "--unigram", "{root}/few.npy"], 1, "counts for 3 tokens"),
        (["tune", "{model}", "-p", "{profile}", "--text", "{text}", "--text", "{root}/a/text.txt"], 1, "two texts are called"),
        (["eval", "--run", "missing.yaml"], 1, "cannot read missing.yaml"),
        (["tune", "{model}", "-p", "{profile}"], 2, "give some text"),
        (["tune", "{model}", "-p", "{profile}", "--text", "{text}", "--name", "a b"], 1, "preset: String should match"),
        (["tune", "--profile", "confsteer-demo"], 2, "say with --out where to write"),
        (["eval", "{model}", "-p", "{profile}", "--text", "{text}", "--window", "64", "-s", "entropy=9"], 1, "is out of reach"),
        (["eval", "{model}", "-p", "{profile}", "--text", "{text}"], 1, "does not fit the model's context of 64"),
        (["eval", "{model}", "-p", "{profile}", "--text", "{text}", "-s", "heat=9"], 1, "unknown key 'heat'"),
        (["generate", "t1", "{model}", "-p", "{profile}", "-s", "entropy"], 1, "'entropy' is not KEY=VALUE"),
        (["generate", "t1", "{model}", "-p", "{profile}", "--max-new-tokens", "0"], 2, "0 is not in the range"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_input_is_a_sentence_and_a_code(folder: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    places = {
        "chats": folder / "chats.jsonl",
        "model": folder / "model",
        "text": folder / "text.txt",
        "profile": folder / "profile",
        "root": folder,
    }
    filled = [argument.format(**places) for argument in arguments]
    if filled[0] == "calibrate":
        filled += ["--out", str(tmp_path / "p")]
    result = run(*filled, code=code)
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "p").exists(), "nothing is written when something is wrong"


@pytest.mark.parametrize("stage", ["discovery.exact.ExactAblation.effects", "calibration.stages.ablation_effects"])
def test_interrupted_calibration_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"confsteer.{stage}", interrupt, raising=True)
    run("calibrate", folder / "model", "--text", folder / "text.txt", "--window", 64, "--out", tmp_path / "p", code=1)
    assert not (tmp_path / "p").exists()


def test_a_missing_extra_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "confsteer.report.plots", raising=False)
    result = run("show", folder / "profile", "--plot", tmp_path / "n.png", code=1)
    assert "pip install 'confsteer[eval]'" in result.output


def test_help_teaches() -> None:
    text = run("--help").output
    for command in main.commands:
        assert command in text
        page = run(command, "--help").output
        assert "Usage:" in page
        assert "\\b" not in page
    assert f"{EXIT_NO_NEURONS} the model has no such neurons, {EXIT_NOTHING_GAINED} tuning gained nothing" in " ".join(
        text.split()
    )
    assert (EXIT_NO_NEURONS, EXIT_NOTHING_GAINED) == (3, 4), "as documented"


def test_help_lists_the_commands_once_and_in_the_order_of_work() -> None:
    work = [
        "calibrate",
        "scan",
        "count",
        "show",
        "push",
        "generate",
        "play",
        "eval",
        "report",
        "tune",
        "lm-eval",
        "bake",
        "export",
        "serve",
        "study",
    ]
    listed = [line.split()[0] for line in run("--help").output.partition("Commands:\n")[2].splitlines()]
    assert listed == list(main.commands) == work


def test_examples_on_the_bundled_model_name_neurons_that_it_has() -> None:
    profile = Profile.load("confsteer-demo")
    for command in main.commands:
        page = run(command, "--help").output
        for neuron in re.findall(r"(?:scale|shift|clamp)\.(\d+)", page) if "confsteer-demo" in page else ():
            assert int(neuron) in {one.index for one in profile.steerable}, command


def test_studies_print_write_json_and_draw(folder: Path, tmp_path: Path) -> None:
    model, text = ("-p", folder / "profile", folder / "model"), ("--text", folder / "other.txt")
    outputs = ("--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    result = run("study", "induction", *model, *text, "--half", 24, "--sequences", 5, *outputs)
    assert "Random (uniform tokens), 5 stretches of 24 tokens." in result.output
    assert "Natural (other.txt), 5 stretches" in result.output
    study = InductionStudy.model_validate_json((tmp_path / "s.json").read_text())
    assert {neuron.index for neuron in study.kinds[1].neurons} == set(ENTROPY_NEURONS)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    without_text = run("study", "induction", *model, "--half", 24, "--sequences", 5)
    assert "Natural" not in without_text.output
    (tmp_path / "s.png").unlink()
    result = run("study", "cumulative", *model, *text, "--window", 64, "-k", 2, "--repeats", 3, *outputs)
    assert "2 random" in result.output
    assert len(CumulativeStudy.model_validate_json((tmp_path / "s.json").read_text()).draws) == 3
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("study", ["induction", "cumulative"])
def test_a_study_of_a_model_without_entropy_neurons_is_a_sentence(folder: Path, tmp_path: Path, study: str) -> None:
    texts = zipf_texts()
    model = tiny_model(*next(f for f in FAMILIES if f.model_type == "llama"))
    confsteer.calibrate(model, tiny_tokenizer(), texts, window=64).save(tmp_path / "p")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("study", study, tmp_path / "model", "-p", tmp_path / "p", "--text", folder / "text.txt")
    result = run(*arguments, code=1)
    assert "has no entropy neurons" in result.output


def test_eval_sweeps_over_several_texts(folder: Path, tmp_path: Path) -> None:
    texts = ("--text", folder / "text.txt", "--text", folder / "other.txt")
    where = ("eval", folder / "model", "-p", folder / "profile", *texts, "--window", 64, "--tokens", 500)
    result = run(*where, "--sweep", "entropy=-0.2:0.2:3", "-s", "scale.5=0", "--json", tmp_path / "e.json", "--csv")
    written = Evaluation.model_validate_json((tmp_path / "e.json").read_text())
    assert [text.source for text in written.texts] == ["text.txt", "other.txt"]
    for text in written.texts:
        assert [row.name for row in text.of_kind("steering")] == ["scale.5=0", "entropy=-0.2", "entropy=+0", "entropy=+0.2"]
    # Nothing but the table is on stdout.
    losses = [(line["source"], line["name"], float(line["loss"])) for line in csv.DictReader(io.StringIO(result.stdout))]
    assert losses == [(text.source, row.name, row.metrics["loss"].value) for text in written.texts for row in text.rows]
    assert "Written:" in result.stderr
    assert "not both" in run(*where, "--csv", "--markdown", code=2).output


RUN = """
model: model
profile: profile
texts:
  - {name: first, text: [text.txt]}
  - {text: [other.txt]}
steerings: [entropy=0.2]
sweeps: ["entropy=-0.2:0.2:2"]
window: 64
tokens: 500
choices: [questions.jsonl]
"""


def test_a_run_file_is_the_options_it_names(folder: Path, tmp_path: Path) -> None:
    (folder / "run.yaml").write_text(RUN)
    questions = [{"question": "t3 t4", "choices": ["t5", f"t{i}"], "answer": i % 2} for i in range(6, 18)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    result = run("eval", "--run", folder / "run.yaml", "--json", tmp_path / "e.json")
    written = Evaluation.model_validate_json((tmp_path / "e.json").read_text())
    assert [text.source for text in written.texts] == ["first", "other.txt"]
    assert [row.name for row in written.texts[0].of_kind("steering")] == ["entropy=+0.2", "entropy=-0.2", "entropy=+0.2"]
    assert [one.source for one in written.choices] == ["questions.jsonl"]
    assert "questions.jsonl" in result.output


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("profile: [", "is not YAML"),
        ("steerings: [entropy=1]", "profile: Field required; a run has model, profile, texts"),
        ("{profile: p, heat: 3}", "heat: Extra inputs are not permitted"),
        ("{profile: p, texts: [{name: a}]}", "a text is files (text), a dataset, or bundled: give one of them"),
        ("{profile: p, model: m, texts: [{text: [a]}, {text: [b/a]}]}", "two texts are called 'a'"),
        ("{profile: p, model: m}", "nothing to evaluate on"),
    ],
)
def test_run_files_that_are_wrong(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises((SettingError, CorpusError)) as error:
        Run.read(tmp_path / "run.yaml").sources()
    assert sentence in str(error.value)


def test_tune_keeps_what_it_found_as_a_preset(folder: Path, tmp_path: Path) -> None:
    """Text of other frequencies than the planted model's has something to be gained on."""
    (tmp_path / "more.txt").write_text("\n".join(zipf_texts(10, 200, seed=4)))
    texts = ("--text", folder / "text.txt", "--text", tmp_path / "more.txt")
    where = ("tune", folder / "model", "-p", folder / "profile", *texts, "--window", 64)
    result = run(*where, "--out", tmp_path / "tuned", "--json", tmp_path / "t.json")
    found = Tuning.model_validate_json((tmp_path / "t.json").read_text())
    assert found.gained
    assert Profile.load(tmp_path / "tuned").presets == {"calibrated": found.steering}
    assert Profile.load(folder / "profile").presets == {}
    assert "everything fitted on the other texts" in result.output
    run(
        "eval",
        folder / "model",
        "-p",
        tmp_path / "tuned",
        "--text",
        folder / "other.txt",
        "--window",
        64,
        "-s",
        "preset=calibrated",
    )


def test_tune_saves_nothing_that_gains_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuning, "gained", False)
    where = ("tune", folder / "model", "-p", folder / "profile", "--text", folder / "text.txt", "--window", 64, "--dials")
    result = run(*where, "--out", tmp_path / "tuned", code=EXIT_NOTHING_GAINED)
    assert "Nothing saved" in result.output
    assert not (tmp_path / "tuned").exists()


def test_where_nothing_can_be_written_is_said_before_the_work(folder: Path, tmp_path: Path) -> None:
    where = (folder / "model", "-p", folder / "profile", "--text", folder / "other.txt")
    for command, options in (("eval", ("--json", "--plot", "--report")), ("tune", ("--json", "--report"))):
        for option in options:
            result = run(command, *where, option, tmp_path / "nowhere" / "file", code=2)
            assert "is not there, or cannot be written to" in result.output


def quiz(file: Path, number: int = 24) -> Path:
    lines = [
        {"question": f"t{i} t{i + 1}", "choices": ["t5", f"t{i + 9} t7"], "answer": "AB"[i % 2], "subject": f"s{i % 2}"}
        for i in range(1, number + 1)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_eval_asks_questions_in_several_ways_and_writes_every_answer(folder: Path, tmp_path: Path) -> None:
    """And a dataset of questions is taken for one; nothing is said of texts, and the model is called as it was given."""
    file, shots = quiz(tmp_path / "quiz.jsonl"), quiz(tmp_path / "shots.jsonl", 1)
    (tmp_path / "set").mkdir()
    quiz(tmp_path / "set" / "train.jsonl", 6)
    result = run(
        *(
            "eval",
            folder / "model",
            "-p",
            folder / "profile",
            "-s",
            "entropy=0.2",
            "--choices",
            file,
            "--dataset",
            tmp_path / "set",
        ),
        *("--format", "letters", "--format", "text", "--shots", shots, "--limit", 12, "--by", "subject"),
        *("--json", tmp_path / "e.json", "--answers", tmp_path / "a.jsonl"),
    )
    written = Evaluation.model_validate_json((tmp_path / "e.json").read_text())
    assert [(one.source, one.wording, one.questions) for one in written.choices] == [
        ("quiz.jsonl", "letters, 1 example", 12),
        ("quiz.jsonl", "text, 1 example", 12),
        ("set train", "letters, 1 example", 6),
        ("set train", "text, 1 example", 6),
    ]
    assert written.choices[0].example.startswith("t1 t2\nA. t5\nB. t10 t7\nAnswer: B\n\n")
    assert written.name == str(folder / "model")
    assert "Min-p and top-p" not in result.output
    assert "all questions" in result.output
    ways = [row for row in written.choices[0].rows if row.kind != "chance"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["source"] == "quiz.jsonl" and line["wording"].startswith("letters")]) == 12 * len(
        ways
    )


def test_what_is_wrong_with_questions_is_found_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    file = quiz(tmp_path / "quiz.jsonl")
    where = ("eval", tmp_path / "no model", "-p", "no profile", "--choices", file)
    for options, code, says in (
        (("--by", "topic"), 1, "question 1 has no field 'topic' to group by"),
        (("--template", "nowhere.jinja"), 1, "neither a file with a template"),
        (("--shots", folder / "chats.jsonl"), 1, "has no 'question'"),
        (("--choices", folder / "chats.jsonl"), 1, "has no 'question'"),
    ):
        assert says in run(*where, *options, code=code).output
    assert "are for questions: give some" in run("eval", "-p", "p", "--format", "letters", code=2).output
    assert "--answers is for questions" in run("eval", "-p", "p", "--answers", tmp_path / "a.jsonl", code=2).output
    assert "not both" in run("tune", "-p", "p", "--choices", file, "--text", folder / "text.txt", code=2).output
    assert "answers are tuned for their loss" in run("tune", "-p", "p", "--choices", file, "--objective", "ece", code=2).output


def test_an_interrupted_eval_keeps_the_files_that_were_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [quiz(tmp_path / f"{name}.jsonl", 6) for name in ("first", "second")]

    def interrupted(*args: Any, source: str, **how: Any) -> ChoiceSample:
        if source == "second.jsonl":
            raise KeyboardInterrupt
        return read_choices(*args, source=source, **how)

    monkeypatch.setattr("confsteer.evaluation.choices.read_choices", interrupted)
    given = ("--choices", files[0], "--choices", files[1], "--json", tmp_path / "e.json", "--answers", tmp_path / "a.jsonl")
    result = run("eval", folder / "model", "-p", folder / "profile", *given, code=EXIT_INTERRUPTED)
    assert "Interrupted" in result.output
    assert [one.source for one in Evaluation.model_validate_json((tmp_path / "e.json").read_text()).choices] == ["first.jsonl"]
    assert {json.loads(line)["source"] for line in (tmp_path / "a.jsonl").read_text().splitlines()} == {"first.jsonl"}
    assert "first.jsonl" in result.output


def test_tune_on_answers_saves_nothing_that_a_temperature_does_too(folder: Path, tmp_path: Path) -> None:
    where = ("tune", folder / "model", "-p", folder / "profile", "--choices", quiz(tmp_path / "quiz.jsonl"), "--dials")
    result = run(*where, "--out", tmp_path / "tuned", "--json", tmp_path / "t.json", code=EXIT_NOTHING_GAINED)
    assert "it does not beat the temperature beyond the interval" in result.output
    assert not (tmp_path / "tuned").exists()
    assert not AnswerTuning.model_validate_json((tmp_path / "t.json").read_text()).gained
