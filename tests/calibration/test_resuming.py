from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

import confsteer
from confsteer import Profile, ResumeError, SettingError
from confsteer.calibration import progress
from confsteer.calibration.progress import FILE_NAME
from confsteer.cli import main
from confsteer.distributed import Process
from confsteer.files import write_atomically
from confsteer.model import states as capture
from confsteer.text.windows import Windows, make_windows
from tests.planted import planted

BATCHES = 5
"""In the text of these tests, the last of them shorter than the others."""


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints after every batch, of which there are several in every pass; a sample smaller than the text."""
    monkeypatch.setattr(progress, "WRITE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("confsteer.calibration.stages.tokens_at_once", lambda n_neurons: 100)
    monkeypatch.setattr("confsteer.calibration.calibrate.SAMPLE_TOKENS", 500)


def text(model_type: str = "gpt2") -> Windows:
    found = planted(model_type)
    return make_windows(found.texts, found.tokenizer, window=64, max_tokens=1000, source="zipf")


def calibrate(model_type: str = "gpt2", **settings: Any) -> Profile:
    found = planted(model_type)
    return confsteer.calibrate(found.model, found.tokenizer, settings.pop("texts", text(model_type)), **settings)


class Stop(BaseException):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, write: int, *, after: bool = True, error: type[BaseException] = Stop) -> None:
    """Raise after (or before) a checkpoint is written for the `write`-th time."""
    real, writes = write_atomically, 0

    def counted(file: Path, payload: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == write and not after:
            raise error
        real(file, payload)
        if writes == write:
            raise error

    monkeypatch.setattr(progress, "write_atomically", counted)


def no_room(file: Path, payload: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def equal(one: Profile, other: Profile) -> bool:
    return one == other and all(torch.equal(column, other.columns[name]) for name, column in one.columns.items())


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_interrupted_anywhere_a_calibration_ends_as_if_it_had_not_been(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    forward, windows = capture._forward, text(model_type)
    firsts = [batch.input_ids[0].tolist() for batch in windows.batches(capture.BATCH_SIZE)]
    assert len(firsts) == BATCHES

    def counted(model: Any, anatomy: Any, input_ids: torch.Tensor, *rest: Any, **cache: Any) -> Any:
        run.append(firsts.index(input_ids[0].tolist()))
        return forward(model, anatomy, input_ids, *rest, **cache)

    monkeypatch.setattr(capture, "_forward", counted)
    left: list[bytes] = []
    with monkeypatch.context() as patch:
        # What is there when the process dies after each write.
        patch.setattr(progress, "write_atomically", lambda file, payload: left.append(payload))
        whole = calibrate(model_type, checkpoint=tmp_path / FILE_NAME)
    assert whole.response.keys() == {"entropy", "unigram"}
    names = ("activations", "effects", "contenders", "responses")
    passes: list[list[int]] = [[] for _ in names]
    for payload in left:
        (tmp_path / FILE_NAME).write_bytes(payload)
        tensors = safetensors.torch.load(payload)
        come_to = [int(tensors[f"{name}.0"]) for name in names if f"{name}.0" in tensors]
        passes[len(come_to) - 1].append(come_to[-1])
        run.clear()
        assert equal(calibrate(model_type, checkpoint=tmp_path / FILE_NAME, resume=True), whole)
        # What is left of the pass, and of the batches before it what later passes need.
        needed_later = range(come_to[-1]) if len(come_to) < len(names) else []
        assert run == [*range(come_to[-1], BATCHES), *needed_later]
    assert passes[0] == [*range(1, BATCHES + 1)]
    for ends in passes[1:]:
        assert len(ends) > 2
        assert ends[-1] == BATCHES


@pytest.mark.usefixtures("every_batch")
def test_an_interrupted_calibration_can_be_interrupted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(tokens=None)
    for _ in range(30):
        with monkeypatch.context() as patch:
            stop_at(patch, 2, after=False)
            try:
                resumed = calibrate(checkpoint=tmp_path / FILE_NAME, resume=True)
                break
            except Stop:
                assert list(tmp_path.iterdir()) == [tmp_path / FILE_NAME]
    assert equal(resumed, whole)


@pytest.mark.usefixtures("every_batch")
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, found = tmp_path / FILE_NAME, planted("gpt2")
    stop_at(monkeypatch, 4)
    with pytest.raises(Stop):
        calibrate(checkpoint=file)
    content = file.read_bytes()
    other_text = make_windows(found.texts, found.tokenizer, window=64, max_tokens=900, source="zipf")
    for settings, named in (
        ({"seed": 1}, "seed"),
        ({"null_dims": 3}, "null_dims"),
        ({"scanned": found.profile}, "scan"),
        ({"texts": other_text}, "text, unigram counts"),
        ({"unigram_counts": other_text.counts(96).numpy()}, "unigram counts"),
    ):
        with pytest.raises(ResumeError, match=f"of another calibration, which differs in: {named}. "):
            calibrate(checkpoint=file, resume=True, **settings)
    finetuned = copy.deepcopy(found.model)
    finetuned.transformer.h[0].mlp.c_fc.weight.data[0, 0] += 1
    with pytest.raises(ResumeError, match="differs in: weights"):
        confsteer.calibrate(finetuned, found.tokenizer, text(), checkpoint=file, resume=True)
    assert file.read_bytes() == content, "what is refused is not written over"
    for damaged in (b"", content[:-1], content[:-1] + bytes([content[-1] ^ 1]), content[:200]):
        file.write_bytes(damaged)
        with pytest.raises(ResumeError, match="Without --resume calibration starts anew"):
            calibrate(checkpoint=file, resume=True)


def test_several_processes_keep_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("confsteer.calibration.calibrate.this_process", lambda: Process(0, 2))
    with pytest.raises(SettingError, match="2 processes keep no checkpoint"):
        calibrate(checkpoint=tmp_path / FILE_NAME, resume=True)


@pytest.mark.usefixtures("every_batch")
def test_a_checkpoint_that_cannot_be_written_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot write .*--resume would not find it"):
        assert equal(calibrate(checkpoint=tmp_path / "file" / FILE_NAME), calibrate())


@pytest.mark.usefixtures("every_batch")
def test_the_command_says_how_to_go_on_and_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model writes its own text, which comes out the same again."""
    planted("llama").save(tmp_path)
    arguments = ["calibrate", str(tmp_path / "model"), "--window", "64", "--tokens", "1000"]

    def run(*options: str, out: str = "p", code: int = 0) -> Result:
        result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / out), *options], env={"COLUMNS": "200"})
        assert result.exit_code == code, (result.output, result.exception)
        return result

    run(out="whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 7, error=KeyboardInterrupt)
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / FILE_NAME).write_bytes(b"of another")
        result = run(code=1)
    assert "which --resume would go on from: starting anew" in result.output
    assert f"What was measured is kept: the same command with --resume goes on from {tmp_path / 'p' / FILE_NAME}" in result.output
    assert "of another calibration, which differs in: text, unigram counts, seed" in run("--resume", "--seed", "1", code=1).output
    assert "from the beginning" not in run("--resume").output
    assert equal(Profile.load(tmp_path / "p"), Profile.load(tmp_path / "whole"))
    for folder in ("p", "whole"):
        assert len(list((tmp_path / folder).iterdir())) == 2
    assert "from the beginning" in run("--resume").output
    with monkeypatch.context() as patch:
        patch.setattr("confsteer.profile.store.write_atomically", no_room)
        result = run("--seed", "1", code=1)
    assert "What was measured is kept" in result.output
    assert result.output.splitlines()[-1].endswith("No space left on device")
    monkeypatch.setattr(capture, "_forward", None)
    run("--seed", "1", "--resume")


@pytest.mark.usefixtures("every_batch")
def test_several_texts_go_on_in_whichever_of_them_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, file = planted("gpt2"), tmp_path / FILE_NAME
    counts = text().counts(found.profile.model.tokenizer_size).numpy()
    texts = {
        name: make_windows(found.texts[rows], found.tokenizer, window=64, source=name)
        for name, rows in (("long", slice(0, 4)), ("short", slice(4, 6)))
    }
    left: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(progress, "write_atomically", lambda file, payload: left.append(payload))
        whole = calibrate(texts=texts, unigram_counts=counts, checkpoint=file)
    assert whole.responses_by_text.keys() == texts.keys()
    stopped_in = [
        max((key for key in safetensors.torch.load(payload) if key.startswith("responses")), default="") for payload in left
    ]
    assert {key[:19] for key in stopped_in} == {"", "responses of text 1", "responses of text 2"}
    for payload in left[stopped_in.index("") :: 2]:
        file.write_bytes(payload)
        assert equal(calibrate(texts=texts, unigram_counts=counts, checkpoint=file, resume=True), whole)
    with pytest.raises(ResumeError, match="differs in: text"):
        calibrate(texts=dict(reversed(texts.items())), unigram_counts=counts, checkpoint=file, resume=True)
