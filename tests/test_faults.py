"""Killed in the middle, or out of room on the disk: what is on the disk is whole, the old or the new."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from confsteer import Profile, Steering
from confsteer.calibration import progress
from confsteer.cli import main
from confsteer.files import write_atomically
from confsteer.model.loading import LoadedModel
from confsteer.runtimes import baking
from tests.models import zipf_texts
from tests.planted import planted

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "fsync")


def killed(action: Callable[[], object], *, operation: int | None = None, size: int | None = None) -> bool:
    """Run `action` in a child that is killed before its `operation`-th change of files, or when a file reaches `size` bytes.

    Returns:
        Whether it came to that.
    """
    child = os.fork()
    if child == 0:
        try:
            # tqdm's is shared by all children: one that is killed while it has it would stop the rest for ever.
            tqdm.set_lock(threading.RLock())
            if size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; by default it kills
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            if operation is not None:
                kill_at(operation)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at(operation: int) -> None:
    operations, fsync = itertools.count(1), os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(fd: Any) -> None:
        hook("fsync", ())
        fsync(fd)

    sys.addaudithook(hook)
    os.fsync = synced


def deaths(action: Callable[[], object], *sizes: int) -> Iterator[bool]:
    """Do `action` with every death there is, and at last without one; whether it died."""
    for size in sizes:
        assert killed(action, size=size)
        yield True
    for operation in itertools.count(1):
        died = killed(action, operation=operation)
        yield died
        if not died:
            assert operation > 3
            return


def test_a_file_is_the_old_or_the_new_whenever_the_process_dies(tmp_path: Path) -> None:
    file, old, new = tmp_path / "file", b"old", b"new" * 1000
    file.write_bytes(old)
    for died in deaths(lambda: write_atomically(file, new), 0, 1, 2999):
        assert file.read_bytes() == (new if not died else old if file.stat().st_size == 3 else new)
        assert len(list(tmp_path.iterdir())) <= 2, "what the last one left is removed by the next"
    assert list(tmp_path.iterdir()) == [file]


def test_a_profile_is_the_old_or_the_new_whenever_the_process_dies(tmp_path: Path) -> None:
    one = planted("gpt2").profile
    others = {True: planted("llama").profile, False: one.with_preset("calm", Steering(entropy=-0.1))}
    for columns_differ, other in others.items():
        folder = tmp_path / str(columns_differ)
        one.save(folder)
        for died in deaths(lambda folder=folder, other=other: other.save(folder), 0, 100, 9000):  # type: ignore[misc]
            found = Profile.load(folder)
            assert found in ((one, other) if died else (other,))
            assert len(list(folder.iterdir())) <= 4
            if found == other and died:
                one.save(folder)
        assert len(list(folder.iterdir())) == 2


def test_a_baked_checkpoint_is_whole_or_not_there_whenever_the_process_dies(tmp_path: Path) -> None:
    found = planted("gpt2")
    baked = baking.Baked(Steering(entropy=0.2), (), None, None, False)

    def bake() -> None:
        with baking.new_folder(tmp_path / "baked") as folder:
            baking.save(LoadedModel(found.model, found.tokenizer), baked, found.profile, folder)

    for died in deaths(bake, 0, 10_000):
        if (tmp_path / "baked").exists():
            state = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").state_dict()
            assert all(torch.equal(tensor, found.model.state_dict()[name]) for name, tensor in state.items())
            shutil.rmtree(tmp_path / "baked")
        else:
            assert died
        assert len(list(tmp_path.iterdir())) <= 1
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    with baking.new_folder(tmp_path / "slow") as folder:
        (folder / "part").touch()
        assert not killed(lambda: write_atomically(tmp_path / "file", b"quick"))
        assert (folder / "part").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"slow", "file"}


@contextlib.contextmanager
def full_disk(room: int = 300) -> Iterator[None]:
    """No file can become larger than this many bytes: an OSError, as Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    planted("llama").save(root)
    (root / "text.txt").write_text("\n".join(zipf_texts(10, 150, seed=4)))
    return root


MODEL = ["{root}/model", "--text", "{root}/text.txt", "--window", "64", "--tokens", "1500"]
PROFILE = ["-p", "{root}/profile"]


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", *MODEL, "--out", "{root}/profile"],
        ["calibrate", *MODEL, "--out", "{root}/new"],
        ["scan", "{root}/model", "--out", "{root}/new"],
        ["show", "{root}/profile", "--plot", "{root}/new.png"],
        ["tune", *MODEL, *PROFILE],
        ["eval", *MODEL, *PROFILE, "-s", "entropy=0.1", "--json", "{root}/new.json"],
        ["eval", *MODEL, *PROFILE, "-s", "entropy=0.1", "--plot", "{root}/new.pdf"],
        ["eval", *MODEL, *PROFILE, "-s", "entropy=0.1", "--report", "{root}/new.html"],
        ["bake", "{root}/model", *PROFILE, "-s", "entropy=0.1", "--out", "{root}/new"],
    ],
    ids=lambda command: f"{command[0]} {command[-2]} {Path(command[-1]).name}",
)
def test_a_full_disk_is_a_sentence_and_changes_nothing(folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import confsteer.report.page
    import confsteer.report.plots

    monkeypatch.setattr(confsteer.Tuning, "gained", True)
    monkeypatch.setattr(progress, "WRITE_INTERVAL_SECONDS", 0.0)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with full_disk():
        result = CliRunner().invoke(main, [word.format(root=folder) for word in command], env={"COLUMNS": "200"})
    assert result.exit_code == 1, (result.output, result.exception)
    last = result.output.splitlines()[-1]
    assert last.startswith("Error: cannot ")
    assert "File too large" in last
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    assert not (folder / "new").exists()
