"""The examples of vLLM, run as they stand."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from confsteer.playground.page import PATH
from tests.browser import chromium
from tests.paths import ROOT
from tests.playground.test_play import TOKENS, answer, opened, text
from tests.runtimes.vllm.serving import serving

pytestmark = pytest.mark.processes

SHADES = "return [...document.querySelectorAll(arguments[0])].map(s => Number(s.style.backgroundColor.match(/([0-9.]+)[)]/)[1]))"
"""Opacity behind each token, in the browser."""


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


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of what the example says to start first."""
    arguments = ["-m", "confsteer", "serve", "--profile", "confsteer-demo", "--max-model-len", "512", "--enforce-eager"]
    with serving(arguments, environment, tmp_path_factory.mktemp("server") / "log") as url:
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


@pytest.mark.browser
def test_the_page_shows_what_the_server_answers(server: str, tmp_path: Path) -> None:
    prompt, high = "It was the best of times, it was", "0.9"
    with chromium(tmp_path) as browser:
        opened(browser, SimpleNamespace(url=server + PATH))
        answer(browser, **{"prompt": prompt, "dial-entropy": high, "temperature": "0"})
        assert text(browser, "wrong") == ""
        assert text(browser, "title1") == f"Steered: entropy={high}"
        entropies = [text(browser, f"entropy{i}") for i in range(2)]
        shades = [browser.execute_script(SHADES, f"#text{i} .token") for i in range(2)]
        texts = [text(browser, f"text{i}") for i in range(2)]
        assert browser.get_log("browser") == []
    likeliest = []
    for i, steering in enumerate(("neutral", f"entropy={high}")):
        body = {"model": "confsteer-demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 20}
        body |= {"vllm_xargs": {"confsteer": steering}}
        (choice,) = httpx.post(f"{server}/v1/completions", json=body, timeout=60).json()["choices"]
        assert texts[i] == choice["text"]
        logprobs = choice["logprobs"]
        # Less probable, deeper shade.
        assert shades[i] == pytest.approx([0.6 * (1 - math.exp(value)) for value in logprobs["token_logprobs"]], abs=2e-3)
        least = sum(at_least(row.values()) for row in logprobs["top_logprobs"]) / TOKENS
        assert entropies[i] == f"Mean entropy: at least {least:.2f} nats, {TOKENS} tokens"
        likeliest.append(max(logprobs["top_logprobs"][0].values()))
    assert entropies[0] != entropies[1]
    assert likeliest[1] < likeliest[0], "of the same prompt, and less confident"


def at_least(logprobs: Iterable[float]) -> float:
    """Entropy of a prediction whose other tokens are as one."""
    probabilities = [math.exp(value) for value in logprobs]
    return -sum(p * math.log(p) for p in (*probabilities, 1 - sum(probabilities)) if p > 0)
