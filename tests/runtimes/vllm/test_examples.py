"""The examples of vLLM, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.runtimes.vllm.serving import serving

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's: this checkout, and vLLM with an engine process of its own."""
    changed = {"PYTHONPATH": str(ROOT), "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))}
    # The scripts' python3 is the one that runs the tests.
    changed["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, **changed, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def test_one_batch_with_a_steering_per_request(environment: dict[str, str]) -> None:
    script = ROOT / "examples" / "vllm_offline.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    nats = {words: float(value) for words, value in re.findall(r"^ *(\S.*?)  ([+-]\d\.\d\d) nats per token", done.stdout, re.M)}
    assert len(nats) == 5, done.stdout
    assert nats["{'entropy': -0.2}"] > nats["None"] > nats["{'entropy': 0.6}"]


@pytest.fixture
def server(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The address of what the example says to start first."""
    arguments = ["-m", "confsteer", "serve", "--profile", "confsteer-demo", "--max-model-len", "512", "--enforce-eager"]
    with serving(arguments, environment, tmp_path / "log") as url:
        yield url


def test_two_clients_of_a_server(server: str, environment: dict[str, str]) -> None:
    script = ROOT / "examples" / "vllm_server.sh"
    done = subprocess.run(["bash", script, server], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    nats = dict(re.findall(r"^entropy=([+-]0\.\d): ([+-]\d\.\d\d) nats per token", done.stdout, re.M))
    assert nats.keys() == {"-0.2", "+0.6"}, (done.stdout, done.stderr)
    assert float(nats["-0.2"]) > float(nats["+0.6"])
    assert '{"entropy": -0.2}:' in done.stdout, "streamed with the OpenAI client"
    assert "entropy=+9 is out of reach" in done.stdout
    assert re.search(r"^confsteer:refused_requests_total\S* 1", done.stdout, re.M)
