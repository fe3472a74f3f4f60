"""Models, texts, files and strings that are wrong or mean harm: each is a sentence, and nothing is written but what was asked."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from confsteer import CorpusError, NoNeuronsError, Profile, Steering, SteeringError
from confsteer.cli import main
from confsteer.errors import ConfsteerError, SettingError
from confsteer.evaluation.run_file import Run
from confsteer.profile.hub import card
from confsteer.report.columns import TableConsole
from confsteer.report.plots import plot_neurons, plot_response
from confsteer.report.results import read_result
from confsteer.report.tables import print_profile
from confsteer.text import sources as texts
from confsteer.text.counts import checked_counts, read_counts
from confsteer.text.questions import read_questions
from confsteer.text.sources import TextSource, read_texts
from confsteer.text.windows import make_windows
from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.planted import planted
from tests.profile.test_hostile_profiles import little_memory


def run(*arguments: object, code: int | None = 1) -> str:
    """What a command says, in one line; it ends with a code that the help names, never with another exception."""
    result: Result = CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert code is None or result.exit_code == code, result.output
    assert "\x1b" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    found = planted("llama")
    found.save(root)
    (root / "text.txt").write_text("\n".join(found.texts))
    return root


Change = Callable[[Path], Any]


def in_file(name: str, content: str | bytes) -> Change:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def in_config(**update: Any) -> Change:
    def change(model: Path) -> None:
        (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | update))

    return change


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return changed


def number(name: str, value: float) -> Change:
    return in_weights(lambda tensors: tensors[name].view(-1).__setitem__(3, value))


def without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def truncated(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-100])


DOWN, HEAD = "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
NOT_FINITE = "the model's logits are not finite; its weights may be damaged"
DAMAGED = "has numbers that are not finite: the checkpoint is damaged"
NO_TOKENIZER = "cannot load the tokenizer of {model}: "
ODD_MODELS: dict[str, tuple[Change, str, str | None]] = {
    "no tokenizer": (without_tokenizer, NO_TOKENIZER, NO_TOKENIZER),
    "tokenizer.json is not JSON": (in_file("tokenizer.json", "{"), NO_TOKENIZER, NO_TOKENIZER),
    "tokenizer.json is of nothing": (in_file("tokenizer.json", "{}"), NO_TOKENIZER, NO_TOKENIZER),
    "tokenizer_config.json is a list": (in_file("tokenizer_config.json", "[]"), NO_TOKENIZER, NO_TOKENIZER),
    "config.json is not JSON": (in_file("config.json", "{broken"), "not a valid JSON file", "not a valid JSON file"),
    "config.json is null": (in_file("config.json", "null"), "cannot load", "cannot load {model}: "),
    "config.json is a list": (in_file("config.json", "[]"), "cannot load", "cannot load {model}: "),
    "config.json is deep": (in_file("config.json", "[" * 100_000), "cannot load", "cannot load {model}: "),
    "config.json is binary": (in_file("config.json", b"\xff\xfe\x00"), "not a valid JSON file", "not a valid JSON file"),
    "a size is a string": (in_config(hidden_size="x"), "'hidden_size' expected int", "'hidden_size' expected int"),
    "no heads": (in_config(num_attention_heads=0), "cannot load", "cannot load {model}: "),
    "no layers": (in_config(num_hidden_layers=0), "LlamaForCausalLM has no layers", "LlamaForCausalLM has no layers"),
    "another vocabulary": (in_config(vocab_size=50), "cannot load {model}: ", "it should be [50, 32]"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no file named model.safetensors", "has no model.safe"),
    "cut weights": (truncated, "incomplete metadata, file not fully covered", "is not a whole safetensors file"),
    "lying weights": (in_file("model.safetensors", b"\xff" * 100), "header too large", "header too large"),
    "a tensor is missing": (
        in_weights(lambda tensors: tensors.pop(DOWN)),
        f"is incomplete, or not of this kind of model: it lacks 1 of its weights, such as {DOWN}",
        f"has no tensor for {DOWN}",
    ),
    "a NaN in the first layer": (number("model.layers.0.mlp.up_proj.weight", float("nan")), NOT_FINITE, None),
    "a NaN in the last projection": (number(DOWN, float("nan")), NOT_FINITE, DAMAGED),
    "an infinity in the unembedding": (number(HEAD, float("inf")), NOT_FINITE, DAMAGED),
    "a NaN in the final norm": (number("model.norm.weight", float("nan")), "neither a LayerNorm nor", DAMAGED),
}
"""What is changed, and what is said of it when the model is loaded and when it is scanned (None: a scan does not see it)."""


@pytest.mark.parametrize("what", ODD_MODELS)
def test_a_damaged_model_is_a_sentence(folder: Path, tmp_path: Path, what: str) -> None:
    change, when_loaded, when_scanned = ODD_MODELS[what]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(folder / "model", model)
    change(model)
    profile = ("-p", folder / "profile", "-s", "entropy=0.1")
    for arguments in (
        ("calibrate", model, "--text", folder / "text.txt", "--window", 64, "--out", out),
        ("generate", "t1 t2", model, *profile),
        ("bake", model, *profile, "--out", out),
    ):
        assert when_loaded.format(model=model) in run(*arguments), arguments[0]
    if when_scanned is not None:
        assert when_scanned.format(model=model) in run("scan", model, "--out", out)
    assert sorted(os.listdir(tmp_path)) == ["model"], "nothing is written"


def test_what_the_check_of_a_model_cannot_see_calibration_does(folder: Path, tmp_path: Path) -> None:
    """An embedding that the check does not read is a NaN."""
    shutil.copytree(folder / "model", tmp_path / "model")
    in_weights(lambda tensors: tensors["model.embed_tokens.weight"][3].fill_(float("nan")))(tmp_path / "model")
    said = run("calibrate", tmp_path / "model", "--text", folder / "text.txt", "--window", 64, "--out", tmp_path / "p")
    assert "are not finite on this text: its weights are damaged, or too large for float32" in said
    assert not (tmp_path / "p").exists()


def test_an_encoder_decoder_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    config = T5Config(vocab_size=96, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for command in (("calibrate", tmp_path), ("generate", "t1", tmp_path, "-p", folder / "profile")):
        assert "(t5) is an encoder-decoder; confsteer steers decoder-only causal language models" in run(*command)


def test_a_tokenizer_of_more_tokens_than_the_model_works_until_it_uses_them(folder: Path, tmp_path: Path) -> None:
    vocabulary = {"<eos>": 0} | {f"t{i}": i for i in range(1, 200)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shutil.copytree(folder / "model", tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"t{i % 190}" for i in range(500)))
    model, profile = tmp_path / "model", ("-p", folder / "profile")
    text = ("--text", tmp_path / "text.txt", "--window", 64)
    sentence = "the model has 96: they do not belong together"
    for arguments in (
        ("calibrate", model, *text, "--out", tmp_path / "p"),
        ("generate", "t3 t150", model, *profile),
        ("eval", model, *profile, *text),
        ("tune", model, *profile, *text),
        ("study", "cumulative", model, *profile, *text),
    ):
        assert sentence in run(*arguments), arguments[0]
    run("generate", "t3 t5", model, *profile, "--max-new-tokens", 2, code=0)
    assert "the prompt has no tokens" in run("generate", " ", model, *profile)


def test_a_model_of_one_layer_and_one_in_float16_are_calibrated(folder: Path, tmp_path: Path) -> None:
    config = next(family.config for family in FAMILIES if family.model_type == "llama")
    tiny_model("llama", config | {"num_hidden_layers": 1}).save_pretrained(tmp_path / "one")
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    text = ("--text", folder / "text.txt", "--window", 64)
    run("calibrate", tmp_path / "one", *text, "--out", tmp_path / "of-one", code=3)
    assert Profile.load(tmp_path / "of-one").model.layer == 0
    half = ("--dtype", "float16", "--device", "cpu")
    run("calibrate", folder / "model", *text, *half, "--out", tmp_path / "half", code=0)
    found = Profile.load(tmp_path / "half")
    assert found.model.dtype == "float16"
    assert {n.index for n in found.entropy_neurons} == {n.index for n in planted("llama").profile.entropy_neurons}
    steered = ("-p", tmp_path / "half", "-s", "entropy=0.3", "--max-new-tokens", 2)
    run("generate", "t1 t2", folder / "model", *steered, *half, code=0)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a"])
def test_what_is_held_in_memory_has_a_limit(tmp_path: Path, name: str) -> None:
    """Two gigabytes of one line, without the disk space."""
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(2_000_000_000)
    with little_memory(), pytest.raises(CorpusError, match=r"has more than 100,000,000 bytes, and is held in memory as a whole"):
        list(read_texts([tmp_path / name]))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_the_limit_is_of_what_is_unpacked(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_DOCUMENT_BYTES", 1_000_000)
    (tmp_path / name).write_bytes(gzip.compress(b"t1 " * 1_000_000, compresslevel=1))
    assert (tmp_path / name).stat().st_size < 100_000
    with pytest.raises(CorpusError, match=r"has more than 1,000,000 bytes"):
        list(read_texts([tmp_path / name]))


def test_the_limit_is_of_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_DOCUMENT_BYTES", 20)
    (tmp_path / "a.txt").write_text("x" * 20)
    (tmp_path / "b.jsonl").write_text('"0123456789"\n' * 5 + '"0123456789012345678901"\n')
    documents = read_texts([tmp_path])
    assert [next(documents) for _ in range(6)] == ["x" * 20, *["0123456789"] * 5]
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 6 has more than 20 bytes"):
        next(documents)


@pytest.mark.parametrize("kind", ["device", "folder of pipes"])
def test_what_is_no_file_is_no_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.txt"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
        os.mkfifo(path / "a.txt")
    with pytest.raises(CorpusError, match=r"neither a file nor a folder|has no file that ends in"):
        read_texts([path])


def test_a_pipe_is_a_text_that_the_shell_made() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"what zcat gave")
    os.close(writing)
    assert list(read_texts([Path(f"/dev/fd/{reading}")])) == ["what zcat gave"]
    os.close(reading)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no text"),
        (b"t1", "the text is too short: it has no document of 8 tokens"),
        (b"t1 t2 t3 t4 t5 t6 t7", "the text is too short: it has no document of 8 tokens"),
        (bytes(range(256)), "is not UTF-8 text"),
        (b"t1 \xc3", "is not UTF-8 text (byte 3 is not valid)"),
        (b"\x7fELF" + b"\x00" * 100, "the text is too short"),
    ],
)
def test_an_odd_text_is_a_sentence(folder: Path, tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    said = run("calibrate", folder / "model", "--text", tmp_path / "a.txt", "--window", 64, "--out", tmp_path / "p")
    assert sentence in said
    assert not (tmp_path / "p").exists()


def test_half_of_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"\\ud83d\\ude00"\n{"text": "t1 \\uD83D"}\n')
    documents = read_texts([tmp_path / "a.jsonl"])
    assert next(documents) == "😀"
    with pytest.raises(CorpusError, match=r"line 2 has half of a character"):
        next(documents)
    (tmp_path / "q.jsonl").write_text('{"question": "\\udc00", "choices": ["a", "b"], "answer": 0}')
    with pytest.raises(CorpusError, match=r"line 1 has half of a character"):
        read_questions([tmp_path / "q.jsonl"])


def test_a_file_need_not_have_a_name_in_utf8(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    file.write_text("t1 " * 20)
    source = TextSource(text=(file,))
    assert source.title == "?.txt"
    assert source.windows(tiny_tokenizer(), 16, None).source == "?.txt"


NASTY = [
    "$\\frac{$",
    "$x$ $",
    "\x1b]0;owned\x07\x1b[2J",
    "[red]x[/red]",
    "[/]",
    "\\",
    "[link=http://x]y\\[/link]",
    "<script>alert(1)</script>",
    "a: b\n- c",
    "`rm -rf ~`",
    "$(id)",
    "| a | b |\n|---|",
    "---",
    "‮gnp.exe",
    "null",
    "{% raw %}{{ 7 * 7 }}",
    "%s%n",
    "../../x",
    "",
]


def named(nasty: str) -> Profile:
    """A profile with `nasty` for each of its strings."""
    profile = planted("llama").profile
    assert profile.corpus is not None
    model = profile.model.model_copy(update={"id": nasty, "model_type": nasty, "revision": nasty, "dtype": nasty})
    corpus = profile.corpus.model_copy(update={"source": nasty})
    return profile.model_copy(update={"model": model, "corpus": corpus, "versions": {nasty: nasty}})


@pytest.mark.parametrize("nasty", NASTY)
def test_a_profiles_strings_are_only_ever_text(tmp_path: Path, nasty: str) -> None:
    profile = named(nasty)
    assert Profile.load(profile.save(tmp_path / "p")) == profile
    shown = io.StringIO()
    print_profile(TableConsole(file=shown, width=1000, force_terminal=True), profile)
    plain = "".join(letter if letter.isprintable() else "�" for letter in nasty)
    assert not plain or shown.getvalue().partition("\x1b[0m")[0] == "\x1b[1m" + plain
    assert "\x1b]" not in shown.getvalue()
    assert "\x1b[2J" not in shown.getvalue()
    written = card(profile, "a/b")
    front = yaml.safe_load(written.split("---\n")[1])
    assert set(front) == {"library_name", "base_model", "tags"}
    assert isinstance(front["base_model"], str)
    assert not set("<>|[]`$\\\x1b") & set(front["base_model"])
    assert len(written.splitlines()) == len(card(planted("llama").profile, "a/b").splitlines())
    assert sorted(os.listdir(tmp_path)) == ["p"]


def test_a_name_is_no_formula_in_a_picture_and_no_order_to_the_terminal(tmp_path: Path) -> None:
    profile = named("$\\frac{$ \x1b]0;owned\x07[/]")
    profile.save(tmp_path)
    for figure in (plot_neurons(profile), plot_response(profile)):
        figure.savefig(io.BytesIO(), format="svg")
    assert "the profile is of $\\frac{$ �]0;owned�[/] with" in run("generate", "t1", "-p", tmp_path, "--max-new-tokens", 1)
    assert "$\\frac{$ �]0;owned�[/] (" in run("show", tmp_path, code=0)


def test_the_default_folder_is_beside_the_user_whatever_the_model_is_called(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "model", tmp_path / "my model")
    (tmp_path / "my model" / "here").mkdir()
    for name, made in ((".", "my model/my model.scan.confsteer"), ("..", "my model/here/my model.scan.confsteer")):
        monkeypatch.chdir(tmp_path / "my model" / ("here" if name == ".." else ""))
        run("scan", name, code=0)
        assert (tmp_path / made / "profile.json").is_file()
    assert os.listdir(tmp_path) == ["my model"]


def chaos(chance: random.Random, depth: int = 0) -> Any:
    """A JSON value, often nearly a steering."""
    kind = chance.randrange(12 if depth < 3 else 7)
    if kind < 2:
        return chance.choice([0, 1, -1, 0.1, -0.2, 1e6, -1e6, 1e-300, chance.uniform(-2, 2)])
    if kind < 4:
        return chance.choice([1e7, 10**400, float("nan"), float("-inf"), -(2**63), True, None, "0.1", "", "entropy", "\ud800"])
    if kind < 7:
        return chance.choice(
            ["all", "generated", "calm", "a b", "x" * 200, [], {}, [None, 1], [1, None], [2, 1], [0.5, 0.5], [None] * 2]
        )
    if kind == 7:
        return [chaos(chance, depth + 1) for _ in range(chance.randrange(4))]
    names = ["5", "11", "20", "entropy", "frequency", 5, "05", "4", "-1", "9" * 30, "٥", "x"]
    if depth == 0 or chance.random() < 0.2:
        names = [*Steering.model_fields, *Steering.model_fields, "x", ""]
    return {chance.choice(names): chaos(chance, depth + 1) for _ in range(chance.randrange(1, 4))}


def words(chance: random.Random) -> str:
    """Text in the small language, often nearly right."""
    keys = [
        *Steering.model_fields,
        "scale.5",
        "clamp.11",
        "shift.entropy",
        "scale.frequency",
        "scale.",
        ".5",
        "scale.5.5",
        "",
        "x",
    ]
    values = [
        "0",
        "0.1",
        "-0.2",
        "+1",
        "1e6",
        "1e999",
        "nan",
        "-inf",
        "0:1",
        ":",
        ":2",
        "1:0",
        "::",
        "all",
        "calm",
        "",
        "1_0",
        "٣",
        "é",
    ]
    joins = ["=", "=", "=", "=", "==", "", " = ", ":"]
    return chance.choice([" ", " ", "\t", "\n", ","]).join(
        chance.choice(keys) + chance.choice(joins) + chance.choice(values) for _ in range(chance.randrange(4))
    )


def requests(chance: random.Random) -> list[Any]:
    value = chaos(chance)
    text = words(chance)
    cut = json.dumps(value)[: chance.randrange(1, 40)]
    return [value, json.dumps(value), text, "{" + cut, *([text + cut] if chance.random() < 0.2 else [])]


def test_any_request_is_a_steering_of_finite_numbers_or_a_sentence() -> None:
    profile = planted("gpt2").profile.with_preset("calm", Steering(entropy=0.05))
    cases = steered = 0
    chance = random.Random(0)
    while cases < 10_000:
        for request in requests(chance):
            cases += 1
            try:
                edit = profile.edit(Steering.parse(request))
            except (SteeringError, NoNeuronsError) as error:
                assert str(error)
            else:
                steered += 1
                assert all(np.isfinite(column).all() for column in (edit.gain, edit.bias))
                assert (edit.low <= edit.high).all()
                assert not (np.isposinf(edit.low) | np.isneginf(edit.high)).any()
    assert steered > 200, "many of them are steerings; an empty text is none"


@pytest.mark.parametrize("request_", [dict.fromkeys(map(str, range(300_000)), 0), {"scale": dict.fromkeys(range(300_000), "x")}])
def test_a_request_of_very_many_names_is_one_sentence(request_: Any) -> None:
    with little_memory(), pytest.raises(SteeringError, match=r"unknown key '0'|300,000 neurons are named") as error:
        Steering.parse(request_)
    assert len(str(error.value)) < 300


def test_any_request_on_the_command_line_is_a_code_and_a_sentence(folder: Path) -> None:
    """Eval reads the steerings before it loads anything, and is kept from loading by a profile that is not there."""
    chance = random.Random(1)
    for _ in range(60):
        for request in requests(chance):
            text = request if isinstance(request, str) else str(request)
            said = run("eval", folder / "model", "-p", "no-profile", "--text", folder / "text.txt", "-s", text, code=None)
            assert "Error: " in said


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 2_000,
        b"profile: 2020-99-99",
        b"profile: " + b"1" * 5_000,
        b"\xff\xfe\x00",
        b"\x00",
        b"!!python/object/apply:os.system ['touch owned']",
        b"? {a: b}\n: c",
        b"b0: &b0 [x]\n" + b"".join(b"b%d: &b%d [%s]\n" % (i, i, b", ".join([b"*b%d" % (i - 1)] * 9)) for i in range(1, 20)),
        b"profile: p\nmodel: " + b"x" * 5_000 + b"\ntexts: 3",
        b"3",
        b"profile: p\nsweeps: &s [*s]",
        b" " * 1_000_001,
    ],
)
def test_a_hostile_run_file_is_a_sentence(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_bytes(content)
    with little_memory(), pytest.raises(SettingError) as error:
        Run.read(tmp_path / "run.yaml")
    assert len(str(error.value)) < 1_000
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_run_file_may_name_what_no_file_can_be_called(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"profile: {'p' * 5_000}\nmodel: {'m' * 300}\nchoices: [q]")
    assert Run.read(tmp_path / "run.yaml").profile == "p" * 5_000


def npy(shape: str, dtype: str = "<i8", data: bytes = b"\x01" * 80) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04junk",
        b"PK\x05\x06" + b"\x00" * 18,
        b"\x80\x04\x95",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00",
        npy("(10**12,)"),
        npy("(1000000000000,)"),
        npy("(-1,)"),
        npy("()"),
        npy("(10, 1)"),
        npy("(20,)"),
        npy("('a',)"),
        npy("(" * 5_000),
        npy("(10,)", "|O"),
        npy("(10,)", "<f8"),
        npy("(10,)", "<M8[s]"),
        npy("(10,)", "nonsense"),
        npy("(10,)", "<i8", b"\xff" * 80),
        npy("(10,)", "<u8", b"\xff" * 80),
        npy("(10,)", "<i8", b"\xff\xff\xff\xff\xff\xff\xff\x7f" * 10),
        npy("(80,)", "|S1"),
        npy("(9,)"),
        npy("(10,)", "<c16"),
    ],
)
def test_hostile_counts_are_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.npy").write_bytes(content)
    with little_memory(), pytest.raises(CorpusError):
        checked_counts(read_counts(tmp_path / "c.npy"), 10)


def test_counts_from_a_pipe_or_without_end_are_a_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "zero.npy").symlink_to("/dev/zero")
    for name in ("pipe.npy", "zero.npy"):
        with pytest.raises(CorpusError, match="it is not a regular file"):
            read_counts(tmp_path / name)
        with pytest.raises(ConfsteerError, match="it is not a regular file"):
            read_result(tmp_path / name)
        with pytest.raises(SettingError, match="it is not a regular file"):
            Run.read(tmp_path / name)


def test_a_text_that_is_only_control_characters_is_text(folder: Path) -> None:
    assert make_windows(["\x00 \x1b[2J " * 20], tiny_tokenizer(), window=16).n_tokens == 40
