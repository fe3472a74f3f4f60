"""The page, in Chromium, against a server of the bundled model."""

from __future__ import annotations

import html.parser
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import confsteer
from confsteer import Steering
from confsteer.playground.page import PATH, page
from confsteer.runtimes.local_server import LocalServer
from tests.browser import chromium
from tests.runtimes.test_local_server import complete, serving

TOKENS = 12


class Tags(html.parser.HTMLParser):
    """Tags of the page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_but_its_server() -> None:
    tags = Tags().found
    policy = next(a["content"] or "" for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    for _, attributes in tags:
        for name in ("src", "href", "action", "style", "onclick", "onload"):
            assert attributes.get(name, "data:,") == "data:,"


def test_every_field_has_a_label() -> None:
    tags = Tags().found
    labelled = {attributes["for"] for tag, attributes in tags if tag == "label"}
    fields = {attributes["id"] for tag, attributes in tags if tag in ("input", "select", "textarea")}
    assert fields == labelled


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    demo = confsteer.demo.load()
    profile = demo.profile.with_preset("calm", Steering(entropy=0.2))
    with serving(demo, profile) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


def opened(browser: Any, server: Any, width: int = 1280) -> Any:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(server.url)
    wait(browser, "return document.querySelectorAll('.dial').length == 2")
    return browser


def wait(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, 0.05).until(lambda driver: driver.execute_script(script))


def answer(browser: Any, **fields: str) -> None:
    """Fill in, and wait for both answers."""
    for name, value in ({"tokens": str(TOKENS)} | fields).items():
        browser.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'));"
            "e.dispatchEvent(new Event('change'))",
            name,
            value,
        )
    # The button is off before the click returns.
    browser.execute_script("document.getElementById('go').click()")
    wait(browser, "return !document.getElementById('go').disabled")


def text(browser: Any, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", name))


def keys(browser: Any, name: str, *pressed: str) -> None:
    browser.find_element("id", name).send_keys(*pressed)


@pytest.mark.browser
def test_both_answers_are_the_servers(browser: Any, server: LocalServer) -> None:
    opened(browser, server)
    answer(browser, **{"dial-entropy": "0.9", "seed": "3"})
    for i, steering in enumerate(("neutral", "entropy=0.9")):
        expected = complete(server, steering, seed=3, prompt="It was the best of times, it was", max_tokens=TOKENS, logprobs=20)
        assert text(browser, f"text{i}") == expected["text"]
        spans = browser.execute_script(f"return [...document.querySelectorAll('#text{i} .token')].map(s => s.textContent)")
        assert len(spans) == TOKENS
        entropies = expected["confsteer"]["entropies"]
        assert text(browser, f"entropy{i}") == f"Mean entropy: {sum(entropies) / TOKENS:.2f} nats, {TOKENS} tokens"
        # Less probable, deeper shade.
        colours = browser.execute_script(
            f"return [...document.querySelectorAll('#text{i} .token')].map(s => s.style.backgroundColor)"
        )
        shades = [float(colour.removesuffix(")").rpartition(",")[2]) for colour in colours]
        assert shades == pytest.approx(
            [0.6 * (1 - math.exp(value)) for value in expected["logprobs"]["token_logprobs"]], abs=1e-3
        )
    assert text(browser, "title1") == "Steered: entropy=0.9"
    assert text(browser, "state").startswith("Done. Mean entropy")
    assert text(browser, "wrong") == ""
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_keyboard_is_enough(browser: Any, server: LocalServer) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, server)
    low, high = server.completions._steerer.profile.reach("entropy")
    slider = browser.find_element("id", "dial-entropy")
    assert low <= float(slider.get_attribute("min")) < low + 0.01
    assert high - 0.01 < float(slider.get_attribute("max")) <= high
    keys(browser, "dial-entropy", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(browser, "sent") == "entropy=0.02"
    assert slider.get_attribute("aria-valuetext") == text(browser, "value-entropy") == "+0.02 nats"
    answer(browser, preset="calm")
    assert text(browser, "title1") == "Steered: preset=calm entropy=0.02"
    keys(browser, "neutral", Keys.ENTER)
    assert text(browser, "sent") == "neutral"
    keys(browser, "text1", Keys.END)
    names = browser.execute_script("return [...document.querySelectorAll('#text1 .token')].map(s => s.textContent)")
    chosen = "return [...document.querySelectorAll('#text1 .token')].findIndex(s => s.classList.contains('chosen'))"
    assert browser.execute_script(chosen) == len(names) - 1
    keys(browser, "text1", Keys.HOME, Keys.ARROW_RIGHT)
    assert browser.execute_script(chosen) == 1
    assert text(browser, "details1").startswith(names[1].replace(" ", "␣"))
    assert "probable. The likeliest:" in text(browser, "details1")
    assert browser.execute_script("return document.querySelectorAll('#details1 li').length") == 5


@pytest.mark.browser
def test_it_fits_a_phone_and_asks_its_server_alone(browser: Any, server: LocalServer) -> None:
    opened(browser, server, width=360)
    answer(browser)
    inside, whole = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inside == 360
    assert whole <= 360, "it scrolls sideways"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    paths = {url.removeprefix(f"http://127.0.0.1:{server.server_port}") for url in requests if not url.startswith("data:")}
    assert paths == {PATH, "/confsteer", "/v1/models", "/v1/completions"}


@pytest.mark.browser
def test_what_the_server_refuses_is_said(browser: Any, server: LocalServer) -> None:
    opened(browser, server)
    answer(browser, prompt="")
    assert text(browser, "wrong") == "400: the prompt has no tokens: there is nothing to continue"
    assert text(browser, "state") == ""


class LikeVllm(BaseHTTPRequestHandler):
    """Answers as vLLM streams them, behind an API key: several tokens a chunk, no entropies, a last chunk of usage alone."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""

    def do_GET(self) -> None:
        dials: dict[str, Any] = {"unigram": {"range": [-1.0, 2.0], "neurons": [3, 5]}}
        dials["entropy"] = {"range": [-1.0, 2.0], "neurons": [], "turns": "null direction, made by hand"}
        described = {"model": "m", "layer": 3, "dials": dials, "presets": {}}
        if self.path == PATH:
            self.answer(200, page().encode(), "text/html")
        elif self.path == "/confsteer":
            self.answer(200, json.dumps(described).encode())
        else:
            self.behind_key(json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        steered = asked["vllm_xargs"]["confsteer"] != "neutral"
        rows = [("It", 0.5), (" is", 0.25), (" done", 0.125)] if steered else [("It", 0.5)]
        top = [{name: math.log(p), " other": math.log(p)} for name, p in rows]
        logprobs = {"tokens": [name for name, _ in rows], "token_logprobs": [math.log(p) for _, p in rows], "top_logprobs": top}
        choice = {"index": 0, "text": "".join(name for name, _ in rows), "logprobs": logprobs}
        end = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
        said: list[dict[str, Any]] = [{"choices": [choice]}, {"choices": [end]}, {"choices": [], "usage": {}}]
        ends = [] if asked["prompt"] == "broken" else ["[DONE]"]
        chunks = [*(json.dumps(chunk) for chunk in said), *ends]
        self.behind_key("".join(f"data: {chunk}\n\n" for chunk in chunks).encode())

    def behind_key(self, body: bytes) -> None:
        if self.headers.get("Authorization") == "Bearer secret":
            self.answer(200, body)
        else:
            self.answer(401, b'{"error": "Unauthorized"}')

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.browser
def test_a_key_is_asked_for_and_answers_as_vllms_are_read(browser: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), LikeVllm) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            opened(browser, SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}{PATH}"))
            said = browser.execute_script("return [...document.querySelectorAll('.turns')].map(e => e.textContent)")
            assert said == ["It turns neurons 3, 5.", "It turns a null direction, made by hand."]
            answer(browser)
            assert text(browser, "wrong") == "401: Unauthorized"
            answer(browser, **{"key": "secret", "dial-entropy": "0.5"})
            assert text(browser, "wrong") == ""
            assert [text(browser, f"text{i}") for i in range(2)] == ["It", "It is done"]
            # Halves: ln 2. A quarter twice and the rest: 1.5 ln 2. An eighth twice and the rest: less.
            rest = -0.75 * math.log(0.75) + 2 * 0.125 * math.log(8)
            mean = (math.log(2) + 1.5 * math.log(2) + rest) / 3
            assert text(browser, "entropy0") == f"Mean entropy: at least {math.log(2):.2f} nats, 1 token"
            assert text(browser, "entropy1") == f"Mean entropy: at least {mean:.2f} nats, 3 tokens"
            answer(browser, prompt="broken")
            assert text(browser, "wrong") == "The server broke off its answer."
            assert browser.execute_script("return document.cookie + JSON.stringify({...localStorage, ...sessionStorage})") == "{}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.browser
def test_what_a_model_or_a_profile_says_is_text(browser: Any, server: LocalServer, tmp_path: Path) -> None:
    """Whatever is generated; a preset's name has letters that cannot do harm."""
    opened(browser, server)
    hostile = "<img src=x onerror=document.title=1>"
    script = (
        "answers[0].add({text: arguments[0], logprobs: {tokens: [arguments[0]], token_logprobs: [-1], "
        "top_logprobs: [{[arguments[0]]: -1}]}}); answers[0].choose(0)"
    )
    browser.execute_script(script, hostile)
    assert text(browser, "text0") == hostile
    assert browser.execute_script("return document.images.length") == 0
    # Without exact entropies a bound is shown: of one alternative and the rest.
    assert text(browser, "entropy0") == "Mean entropy: at least 0.66 nats, 1 token"
