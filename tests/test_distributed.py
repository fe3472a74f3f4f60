from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from confsteer import Profile, SettingError
from confsteer.discovery.streaming import ActivationMoments
from confsteer.distributed import SINGLE_PROCESS, Process, all_reduce, broadcast, init_distributed
from tests.planted import planted


def test_one_process_is_alone_and_changes_nothing() -> None:
    assert init_distributed() == SINGLE_PROCESS
    values = torch.randn(3)
    assert all_reduce(values) is values
    assert broadcast(values) is values


def test_pooled_moments_are_those_of_all_tokens() -> None:
    torch.manual_seed(0)
    whole = 100 + torch.randn(50, 4, dtype=torch.float64)
    parts = [ActivationMoments(4), ActivationMoments(4)]
    for part, rows in zip(parts, whole.split([13, 37]), strict=True):
        part.update(rows)
    barrier, given = threading.Barrier(2), {}

    def pool(rank: int) -> None:
        def all_reduce(values: torch.Tensor) -> torch.Tensor:
            given[rank] = values
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        parts[rank].pool(all_reduce)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(pool, range(2)))
    for part in parts:
        assert part.count == 50
        torch.testing.assert_close(part.mean, whole.mean(0))
        torch.testing.assert_close(part.std, whole.std(0))


def calibrate(folder: Path, out: Path, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "confsteer", "calibrate", str(folder / "model"), "--text", str(folder / "texts")]
    command += ["--text", str(folder / "more")]
    return subprocess.run(
        [*command, "--window", "64", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    model, tokenizer, texts, _ = planted("gpt2")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name in ("texts", "more"):
        (folder / name).mkdir()
    for number, text in enumerate(texts):
        # The second text has fewer batches than there are processes.
        (folder / ("texts" if number else "more") / f"{number:02}.txt").write_text(text)
    return folder


def test_two_processes_make_the_profile_of_one(folder: Path, tmp_path: Path) -> None:
    two = calibrate(folder, tmp_path / "two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Profile written") == 1
    one = calibrate(folder, tmp_path / "one", [])
    assert one.returncode == 0, one.stderr
    ours, theirs = Profile.load(tmp_path / "two"), Profile.load(tmp_path / "one")
    assert ours.corpus == theirs.corpus
    assert [n.index for n in ours.entropy_neurons] == [n.index for n in theirs.entropy_neurons]
    assert [n.index for n in ours.frequency_neurons] == [n.index for n in theirs.frequency_neurons]
    for name, column in theirs.columns.items():
        scale = float(column.abs().max())
        torch.testing.assert_close(ours.columns[name], column, rtol=1e-6, atol=1e-6 * scale, msg=name)
    assert ours.responses_by_text.keys() == theirs.responses_by_text.keys() == {"texts", "more"}
    for some, others in (
        (ours.response, theirs.response),
        *((ours.responses_by_text[text], curves) for text, curves in theirs.responses_by_text.items()),
    ):
        for dial, curve in others.items():
            for name, values in curve:
                assert getattr(some[dial], name) == pytest.approx(values, rel=1e-6, abs=1e-6), name


def test_more_processes_than_text_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import confsteer

    monkeypatch.setattr("confsteer.calibration.calibrate.this_process", lambda: Process(0, 100))
    model, tokenizer, texts, _ = planted("gpt2")
    with pytest.raises(SettingError, match="too few for 100 processes"):
        confsteer.calibrate(model, tokenizer, texts, window=64)
