"""Kill commands at random points and look at what is left on the disk.

    OMP_NUM_THREADS=1 python eval/faults.py --kills 200

One parent imports and loads everything once and forks; each child runs a command as the command line does and is killed with
SIGKILL: every other one after a random part of the command's duration, the rest just before a random one of the changes it
makes to files. After each kill the profile must load and be the one there was or the one there was to be; a baked checkpoint
must be whole or not there; what is on the hub must be whole commits; and what killed processes leave must not pile up.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import confsteer.calibration.stages
import confsteer.model.loading
import confsteer.tuning.tune
from confsteer import Profile
from confsteer.calibration import progress
from confsteer.cli import main
from confsteer.model.loading import LoadedModel
from confsteer.profile import hub
from confsteer.profile.schema import library_versions
from tests.models import zipf_texts
from tests.planted import planted

CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
FOUND = planted("llama")


class LocalHub:
    """In place of ``HfApi``: a repository is a folder of commits, each made in one step."""

    root: Path

    def create_repo(self, repo: str, **options: Any) -> str:
        (self.root / "commits").mkdir(parents=True, exist_ok=True)
        return repo

    def upload_folder(self, *, folder_path: str, **options: Any) -> None:
        upload = Path(tempfile.mkdtemp(dir=self.root))
        shutil.copytree(folder_path, upload / "content")
        (upload / "content").rename(self.root / "commits" / str(time.monotonic_ns()))


def fork(command: list[str], prepare: Callable[[], object]) -> int:
    """A child that runs a command without a word; its process id."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            loud = os.dup(2)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            # tqdm's is shared by all children: one that is killed while it has it would stop the rest for ever.
            tqdm.set_lock(threading.RLock())
            prepare()
            try:
                main(command)
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else 1
            except BaseException:
                os.write(loud, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return child


def count_changes(root: Path, on_change: Callable[[int], object]) -> None:
    """Call `on_change` before each change of files under `root`, with its number."""
    numbers, fsync = itertools.count(1), os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and str(arguments[0]).startswith(str(root)):
            on_change(next(numbers))

    def synced(fd: Any) -> None:
        on_change(next(numbers))
        fsync(fd)

    sys.addaudithook(hook)
    os.fsync = synced


def whole(root: Path, command: list[str], prepare: Callable[[], object] = lambda: None) -> tuple[float, int]:
    """Run a command to its end; how long that takes, and how many changes of files it makes."""
    (root / "changes").touch()

    def counting() -> None:
        prepare()
        descriptor = os.open(root / "changes", os.O_WRONLY)
        count_changes(root, lambda number: os.pwrite(descriptor, str(number).encode(), 0))

    began = time.monotonic()
    _, status = os.waitpid(fork(command, counting), 0)
    assert os.WIFEXITED(status), status
    assert os.WEXITSTATUS(status) == 0, (command, os.WEXITSTATUS(status))
    return time.monotonic() - began, int((root / "changes").read_text())


class Killer:
    """Kills a command at a random point of its time, or of its changes of files, by turns."""

    def __init__(self, root: Path, chance: random.Random, seconds: float, changes: int, prepare: Callable[[], object]) -> None:
        self.root, self.chance, self.seconds, self.changes, self.prepare = root, chance, seconds, changes, prepare
        self.turns = itertools.count()

    def __call__(self, command: list[str]) -> bool:
        """Whether it was killed; otherwise it came to its end first."""
        at = self.chance.randint(1, self.changes) if next(self.turns) % 2 else 0

        def kill(number: int) -> None:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def prepare() -> None:
            self.prepare()
            if at:
                count_changes(self.root, kill)

        child = fork(command, prepare)
        if not at:
            time.sleep(self.chance.uniform(0, self.seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, (command, os.WEXITSTATUS(status))
        return os.WIFSIGNALED(status)


def load(folder: Path) -> Profile | None:
    """The profile in a folder; None if it is broken."""
    try:
        return Profile.load(folder)
    except confsteer.ConfsteerError:
        return None


def kill_many(
    kills: int, strike: Callable[[], bool], check: Callable[[bool], str], leftovers: Callable[[], int]
) -> dict[str, Any]:
    """Strike until `kills` have hit; how often each state was found after one."""
    found = {"kills": 0, "old": 0, "new": 0, "broken": 0, "most_left_over": 0}
    while found["kills"] < kills:
        was_killed = strike()
        state = check(was_killed)
        if was_killed or state == "broken":
            found["kills"] += was_killed
            found[state] += 1
        found["most_left_over"] = max(found["most_left_over"], leftovers())
    return found


def kill_calibrate(root: Path, chance: random.Random, kills: int, *, resume: bool) -> dict[str, Any]:
    """Over a profile of the other seed; with `resume` each run goes on from what the killed one left."""
    out = root / "profile"
    options = ["--text", str(root / "text.txt"), "--window", "64", "--tokens", "1500", "--out", str(out)]
    commands = [["calibrate", str(root / "model"), *options, "--seed", str(seed)] for seed in (0, 1)]
    expected: list[Profile] = []
    for command in reversed(commands):
        seconds, changes = whole(root, command, every_batch)
        expected.insert(0, Profile.load(out))
    killer, seed, done = Killer(root, chance, seconds, changes, every_batch), 1, 0

    def strike() -> bool:
        return killer(commands[seed] + (["--resume"] if resume else []))

    def check(was_killed: bool) -> str:
        nonlocal seed, done
        found = load(out)
        if found == expected[seed]:
            done += 1
            seed = 1 - seed
            # A finished run may have been killed before it took its checkpoint away.
            (out / progress.FILE_NAME).unlink(missing_ok=True)
            return "new"
        return "old" if found == expected[1 - seed] and was_killed else "broken"

    # Beside profile.json, its columns and the checkpoint.
    return kill_many(kills, strike, check, lambda: max(0, len(list(out.iterdir())) - 3)) | {"calibrations_finished": done}


def every_batch() -> None:
    progress.WRITE_INTERVAL_SECONDS = 0.0
    confsteer.calibration.stages.tokens_at_once = lambda n_neurons: 300  # type: ignore[attr-defined]


def kill_tune(root: Path, chance: random.Random, kills: int) -> dict[str, Any]:
    """In place, of a profile without the preset."""
    folder, command = root / "profile", ["tune", str(root / "model"), "-p", str(root / "profile")]
    command += ["--text", str(root / "other.txt"), "--window", "64", "--tokens", "1500", "--dials"]
    FOUND.profile.save(folder)

    def prepare() -> None:
        confsteer.tuning.tune.Tuning.gained = True  # type: ignore[assignment, method-assign]

    seconds, changes = whole(root, command, prepare)
    new = Profile.load(folder)
    assert new.presets
    FOUND.profile.save(folder)
    killer = Killer(root, chance, seconds, changes, prepare)

    def check(was_killed: bool) -> str:
        found = load(folder)
        if found == new:
            FOUND.profile.save(folder)
            return "new"
        return "old" if found == FOUND.profile and was_killed else "broken"

    return kill_many(kills, lambda: killer(command), check, lambda: max(0, len(list(folder.iterdir())) - 2))


def kill_push(root: Path, chance: random.Random, kills: int) -> dict[str, Any]:
    """``new``: there is one more commit."""
    folder, commits = root / "profile", root / "hub" / "commits"
    FOUND.profile.save(folder)
    LocalHub.root = root / "hub"
    vars(hub)["HfApi"] = LocalHub
    tempfile.tempdir = str(root / "temporary")
    Path(tempfile.tempdir).mkdir()
    command = ["push", str(folder), "someone/profile"]
    seconds, changes = whole(root, command)
    known = set(commits.iterdir())
    killer = Killer(root, chance, seconds, changes, lambda: None)

    def check(was_killed: bool) -> str:
        new = set(commits.iterdir()) - known
        known.update(new)
        good = load(folder) == FOUND.profile and all(load(commit) == FOUND.profile for commit in new)
        good &= all((commit / "README.md").stat().st_size > 0 for commit in new) and len(new) <= 1
        return ("new" if new else "old" if was_killed else "broken") if good else "broken"

    result = kill_many(kills, lambda: killer(command), check, lambda: len(list(folder.iterdir())) - 2)
    tempfile.tempdir = None
    return result


def kill_bake(root: Path, chance: random.Random, kills: int) -> dict[str, Any]:
    """``old``: there is no checkpoint."""
    place = root / "bake"
    place.mkdir()
    FOUND.profile.save(root / "profile")
    command = ["bake", str(root / "model"), "-p", str(root / "profile"), "-s", "entropy=0.1", "--out", str(place / "out")]
    seconds, changes = whole(root, command)
    names = {file.name for file in (place / "out").iterdir()}
    expected = AutoModelForCausalLM.from_pretrained(place / "out").state_dict()
    shutil.rmtree(place / "out")
    killer = Killer(root, chance, seconds, changes, lambda: None)

    def check(was_killed: bool) -> str:
        if not (place / "out").exists():
            return "old" if was_killed else "broken"
        state = AutoModelForCausalLM.from_pretrained(place / "out").state_dict()
        good = all(torch.equal(tensor, expected[name]) for name, tensor in state.items()) and state.keys() == expected.keys()
        good &= {file.name for file in (place / "out").iterdir()} == names
        shutil.rmtree(place / "out")
        return "new" if good else "broken"

    return kill_many(kills, lambda: killer(command), check, lambda: len(list(place.iterdir())))


@click.command()
@click.option("--kills", default=200, show_default=True, help="Of each command.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="eval/faults.json", show_default=True, type=click.Path(path_type=Path))
def faults(kills: int, seed: int, out: Path) -> None:
    # A forked child must not wait for threads that it does not have.
    torch.set_num_threads(1)
    chance = random.Random(seed)
    confsteer.model.loading.load_model = lambda *args, **options: LoadedModel(FOUND.model, FOUND.tokenizer)
    context = {"python": platform.python_version(), **library_versions(), "seed": seed}
    results: dict[str, Any] = {}
    strikes: dict[str, Callable[[Path], dict[str, Any]]] = {
        "calibrate": lambda root: kill_calibrate(root, chance, kills, resume=False),
        "calibrate --resume": lambda root: kill_calibrate(root, chance, kills, resume=True),
        "tune": lambda root: kill_tune(root, chance, kills),
        "push": lambda root: kill_push(root, chance, kills),
        "bake": lambda root: kill_bake(root, chance, kills),
    }
    for name, kill in strikes.items():
        with tempfile.TemporaryDirectory(prefix="confsteer-faults-") as folder:
            root = Path(folder)
            FOUND.save(root)
            (root / "text.txt").write_text("\n".join(FOUND.texts))
            (root / "other.txt").write_text("\n".join(zipf_texts(10, 200, seed=4)))
            results[name] = kill(root)
        print(f"{name}: {results[name]}", flush=True)
        out.write_text(json.dumps({"context": context, "commands": results}, indent=1) + "\n")
    if any(result["broken"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    faults()
