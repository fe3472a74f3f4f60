"""A real server process, asked by the OpenAI client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from confsteer import Profile, Steering
from confsteer.model.loading import load_model, load_tokenizer
from confsteer.playground.page import PATH, page
from confsteer.profile.dials import example_effects
from confsteer.runtimes.vllm.front.command import server_command
from confsteer.text.windows import prompt_ids
from tests.paths import ROOT
from tests.runtimes.vllm import parity
from tests.runtimes.vllm.fuzz import Fuzz, send_all, takes, unexpected
from tests.runtimes.vllm.parity import Subject
from tests.runtimes.vllm.serving import serving

pytestmark = pytest.mark.processes

REAL_PROFILE = "smollm2-135m-instruct"
REAL_CHECKPOINT = Path(os.environ.get("CONFSTEER_REAL_MODELS", ROOT / "real-models")) / REAL_PROFILE
"""Folder with the weights of SmolLM2-135M-Instruct."""


class Server(NamedTuple):
    subject: Subject
    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def complete(self, steering: Any, **options: Any) -> httpx.Response:
        body = {"model": "subject", "prompt": [1, 2, 3, 4], "max_tokens": 4, "logprobs": 2, "temperature": 0} | options
        body |= {"vllm_xargs": {"confsteer": steering}}
        return httpx.post(
            self.url + "/v1/completions",
            content=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            timeout=60,
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`confsteer serve`, compiled, few tokens a step, with a chat template and a default steering."""
    folder = tmp_path_factory.mktemp("server")
    subject = parity.subject("gpt2", folder)
    template = subject.model_folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    options = ["--served-model-name", "subject", "--dtype", "float32"]
    options += [
        "--max-model-len",
        "64",
        "--max-num-seqs",
        "8",
        "--max-num-batched-tokens",
        "16",
        "--chat-template",
        str(template),
    ]
    options += ["--return-tokens-as-token-ids"]
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    command = server_command(str(subject.model_folder), str(subject.profile_folder), "entropy=0.1", options, environment)
    with serving(command.arguments, command.environment, folder / "log") as url:
        yield Server(subject, url, folder / "log")


def token_id(token: str) -> int:
    """With ``--return-tokens-as-token-ids``."""
    return int(token.removeprefix("token_id:"))


def check(server: Server, prompt: list[int], steering: Any, tokens: list[int], rows: list[dict[int, float]]) -> None:
    seen = {len(prompt) + i: row for i, row in enumerate(rows)}
    found = parity.difference(server.subject, prompt + tokens, len(prompt), steering, seen)
    assert found.error <= parity.TOLERANCE, (steering, found)
    if steering is not None:
        assert found.teeth >= parity.TEETH, (steering, found)


def check_completion(server: Server, prompt: list[int], steering: Any, choice: Any) -> None:
    logprobs = choice["logprobs"] if isinstance(choice, dict) else choice.logprobs.model_dump()
    rows = [{token_id(token): value for token, value in row.items()} for row in logprobs["top_logprobs"]]
    check(server, prompt, steering, [token_id(token) for token in logprobs["tokens"]], rows)


def test_the_start_up_line_says_what_can_be_steered(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "confsteer: steering" in line]
    assert len(lines) == 1
    assert "layer 1: entropy" in lines[0]
    assert "proved on every rank" in lines[0]


def test_concurrent_clients_with_different_steerings_get_what_transformers_gives(server: Server) -> None:
    """Completions and chat, whole and streamed, several of a prompt, all at once."""
    asked = [steering for steering in parity.steerings(server.subject.profile) if steering is not None]
    sent = [steering if isinstance(steering, str) else json.dumps(steering) for steering in asked]
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120)
    prompts = parity.prompts(len(asked), vocabulary=96, longest=24, seed=3)

    async def complete(prompt: list[int], steering: str) -> Any:
        extra = {"vllm_xargs": {"confsteer": steering}}
        return await client.completions.create(
            model="subject", prompt=prompt, max_tokens=8, n=2, logprobs=3, temperature=1.0, extra_body=extra
        )

    async def stream(prompt: list[int], steering: str) -> list[Any]:
        extra = {"vllm_xargs": {"confsteer": steering}}
        chunks = await client.completions.create(
            model="subject", prompt=prompt, max_tokens=8, logprobs=3, temperature=1.0, stream=True, extra_body=extra
        )
        return [chunk async for chunk in chunks]

    async def chat(prompt: list[int], steering: str) -> Any:
        extra = {"vllm_xargs": {"confsteer": steering}}
        text = " ".join(f"t{i}" for i in prompt)
        return await client.chat.completions.create(
            model="subject",
            messages=[{"role": "user", "content": text}],
            max_completion_tokens=8,
            logprobs=True,
            top_logprobs=3,
            temperature=1.0,
            extra_body=extra,
        )

    async def everything() -> list[Any]:
        pairs = list(zip(prompts, sent, strict=True))
        return await asyncio.gather(*(ask(*pair) for pair in pairs for ask in (complete, stream, chat)))

    answers = iter(asyncio.run(everything()))
    for prompt, steering in zip(prompts, asked, strict=True):
        for choice in next(answers).choices:
            check_completion(server, prompt, steering, choice)
        logprobs = [chunk.choices[0].logprobs for chunk in next(answers) if chunk.choices and chunk.choices[0].logprobs]
        rows = [{token_id(t): v for t, v in row.items()} for part in logprobs for row in part.top_logprobs]
        check(server, prompt, steering, [token_id(token) for part in logprobs for token in part.tokens], rows)
        content = next(answers).choices[0].logprobs.content
        rows = [{token_id(top.token): top.logprob for top in entry.top_logprobs} for entry in content]
        check(server, prompt, steering, [token_id(entry.token) for entry in content], rows)


def test_the_default_and_its_opposite(server: Server) -> None:
    body = {"model": "subject", "prompt": [1, 2, 3, 4], "max_tokens": 4, "logprobs": 2}
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    check_completion(server, [1, 2, 3, 4], "entropy=0.1", answer.json()["choices"][0])
    check_completion(server, [1, 2, 3, 4], None, server.complete("{}").json()["choices"][0])


def test_what_can_be_steered_is_said_and_no_path(server: Server) -> None:
    profile = server.subject.profile
    said = server.get("/confsteer").json()
    assert said["dials"]["entropy"]["range"] == list(profile.reach("entropy"))
    effects = [effect._asdict() for effect in example_effects(profile, "entropy")]
    assert said["dials"]["entropy"]["effects"] == json.loads(json.dumps(effects))
    assert said["dials"]["unigram"]["neurons"] == [20]
    assert said["presets"] == {"calm": str(profile.presets["calm"])}
    assert Steering.parse(said["default"]) == Steering(entropy=0.1)
    assert said["checksum"] == profile.checksum
    assert (said["profile"], said["model"]) == (server.subject.profile_folder.name, Path(profile.model.id).name)
    assert str(server.subject.profile_folder.parent) not in json.dumps(said)


def test_the_page_is_there_and_reads_what_the_server_answers(server: Server) -> None:
    answer = server.get(PATH)
    assert (answer.status_code, answer.text) == (200, page())
    assert answer.headers["content-type"].startswith("text/html")
    body = {
        "model": "subject",
        "prompt": "t1 t2 t3",
        "max_tokens": 4,
        "stream": True,
        "logprobs": 20,
        "temperature": 1,
        "seed": 3,
    }
    for steering in ("neutral", "preset=calm unigram=0.05"):
        sent = body | {"vllm_xargs": {"confsteer": steering}}
        lines = httpx.post(server.url + "/v1/completions", json=sent, timeout=60).text.split("\n\n")
        choices = [json.loads(line[5:])["choices"][0] for line in lines if line.startswith("data:") and "[DONE]" not in line]
        found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        assert sum(len(one["tokens"]) for one in found) == 4
        for one in found:
            assert len(one["tokens"]) == len(one["token_logprobs"]) == len(one["top_logprobs"])
            assert all(20 <= len(top) <= 21 for top in one["top_logprobs"])


def counters(server: Server) -> dict[str, float]:
    lines = [line.split() for line in server.get("/metrics").text.splitlines() if line.startswith("confsteer:")]
    return {name.removeprefix("confsteer:").removesuffix("_total"): float(value) for name, value in lines if "_total" in name}


def test_requests_and_tokens_are_counted(server: Server) -> None:
    before = counters(server)
    assert server.complete("entropy=-0.1", max_tokens=7, ignore_eos=True).status_code == 200
    assert server.complete("entropy=99").status_code == 400
    assert server.complete("{}").status_code == 200
    after = counters(server)
    assert {name: after[name] - before[name] for name in after} == {
        "steered_requests": 1,
        "refused_requests": 1,
        "steered_tokens": 7,
    }


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"n": 3, "temperature": 1.0}])
@pytest.mark.parametrize(
    ("steering", "sentence"),
    [
        ("entropy=99", "out of reach: on this model it can go from"),
        ('{"entropie": 1}', "unknown key 'entropie'"),
        ('{"entropy": NaN}', "finite"),
        ('{"entropy": 1e999}', "entropy: Input should be"),
        ('{"scale": {"7": 0}}', "neuron 7: not in the profile"),
        ('{"preset": "loud"}', "has calm"),
        ("x" * 10_001, "at most 10,000 characters"),
        ([1, 2], "not list"),
        (3, "not int"),
    ],
)
def test_a_wrong_steering_is_a_400_with_the_sentence(
    server: Server, steering: Any, sentence: str, options: dict[str, Any]
) -> None:
    answer = server.complete(steering, **options)
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]


CHAT = [{"role": "user", "content": "w3 w4"}]
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2, 3, 4], "max_tokens": 4},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [CHAT, CHAT], "max_tokens": 4},
    "/v1/responses": {"input": "w3 w4", "max_output_tokens": 16},
    "/v1/messages": {"messages": CHAT, "max_tokens": 4},
    "/generative_scoring": {"query": [1, 2, 3, 4], "items": [[5, 6], [7]], "label_token_ids": [10, 11], "apply_softmax": False},
    "/inference/v1/generate": {"token_ids": [1, 2, 3, 4], "sampling_params": {"max_tokens": 4}},
    "/invocations": {"prompt": [1, 2, 3, 4], "max_tokens": 4},
}
"""Routes that ask the engine, each with a good request."""
NEVER_GENERATING = {
    "/abort_requests",
    "/detokenize",
    "/is_scaling_elastic_ep",
    "/ping",
    "/scale_elastic_ep",
    "/tokenize",
    "/v1/chat/completions/derender",
    "/v1/chat/completions/render",
    "/v1/completions/derender",
    "/v1/completions/render",
    "/v1/messages/count_tokens",
    "/v1/responses/{response_id}/cancel",
    "/v1/systemone",  # answers of a kind of model that there is none of here
}


def test_every_route_steers_what_it_generates(server: Server) -> None:
    """A route that a new release brings fails here until it is looked at, and stands in one of the tables."""
    paths = server.get("/openapi.json").json()["paths"]
    routes = {path for path, methods in paths.items() if "post" in methods}
    assert "/v1/completions" in routes
    assert routes <= GENERATING.keys() | NEVER_GENERATING

    def steered(path: str, steering: str) -> float:
        before = counters(server)["steered_requests"]
        body = {"model": "subject", **GENERATING[path], "vllm_xargs": {"confsteer": steering}}
        answer = httpx.post(server.url + path, json=body, timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        return counters(server)["steered_requests"] - before

    for path in routes & GENERATING.keys():
        assert steered(path, "{}") == 0, "the default is not wanted"
        assert steered(path, "entropy=0.3") == (2 if path in ("/generative_scoring", "/v1/chat/completions/batch") else 1), path


def test_a_wrong_steering_is_a_400_of_every_route_before_a_stream_begins(server: Server) -> None:
    routes = [path for path, methods in server.get("/openapi.json").json()["paths"].items() if "post" in methods]
    for path in [*routes, "/v1/audio/transcriptions"]:
        for stream in (False, True):
            body = {"model": "subject", "stream": stream, **GENERATING.get(path, {}), "vllm_xargs": {"confsteer": "entropy=9"}}
            answer = httpx.post(server.url + path, json=body, timeout=60)
            assert answer.status_code == 400, (path, answer.text)
            assert "entropy=+9 is out of reach" in answer.json()["error"]["message"]


def test_scores_and_messages_are_steered_as_what_they_are_made_of(server: Server) -> None:
    def post(path: str, steering: str, **options: Any) -> Any:
        body = {"model": "subject", **GENERATING[path], **options, "vllm_xargs": {"confsteer": steering}}
        return httpx.post(server.url + path, json=body, timeout=60).json()

    for steering in ("{}", "entropy=0.5"):
        scores = [row["score"] for row in post("/generative_scoring", steering)["data"]]
        for text, score in zip(([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7]), scores, strict=True):
            logprobs = parity.expected(server.subject, text, len(text), steering)[-1]
            assert score == pytest.approx(logprobs[10].exp().item(), rel=1e-3)
    strong = f"scale.{server.subject.profile.steerable[0].index}=-40"
    texts = {}
    for steering in ("{}", strong):
        messages = post("/v1/messages", steering, temperature=0, max_tokens=16)["content"][0]["text"]
        chat = post("/v1/chat/completions", steering, temperature=0, max_tokens=16)["choices"][0]["message"]["content"]
        assert messages == chat
        texts[steering] = chat
    assert texts["{}"] != texts[strong]


@pytest.mark.parametrize("steering", ["{}", "entropy=0.5"])
def test_beams_have_their_request_s_steering(server: Server, steering: str) -> None:
    choices = server.complete(steering, use_beam_search=True, n=2).json()["choices"]
    assert len(choices) == 2
    for choice in choices:
        check_completion(server, [1, 2, 3, 4], None if steering == "{}" else steering, choice)


def test_a_window_is_kept_and_refused_of_beams(server: Server) -> None:
    for ask in parity.windows(server.subject, 3, tokens=9, longest=9):
        options = {"prompt": ask.prompt, "max_tokens": ask.tokens, "ignore_eos": True}
        answer = server.complete(json.dumps(ask.steering), **options).json()
        check_completion(server, ask.prompt, ask.steering, answer["choices"][0])
        beams = server.complete(json.dumps(ask.steering), use_beam_search=True, n=2, **options)
        assert beams.status_code == 400, beams.text
        assert "does not go together with beam search in vLLM" in beams.json()["error"]["message"]
    unknown = server.complete("entropy=0.1 positions=after:</think>")
    assert unknown.status_code == 400
    assert "the model's tokens for that spell ' <eos>'" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/generative_scoring"])
@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"confsteer": "entropy=0.3"}, "in confsteer:"),
        ({"confsteer": {"entropy": 0.3}}, "in confsteer:"),
        ({"extra_args": {"confsteer": "entropy=0.3"}}, "in extra_args.confsteer:"),
        ({"extra_body": {"vllm_xargs": {"confsteer": "entropy=0.3"}}}, "in extra_body.vllm_xargs.confsteer:"),
        ({"vllm_xargs": {"confster": "entropy=0.3"}}, "in vllm_xargs.confster:"),
        ({"vllm_xargs": {"entropy": 0.3}}, "in vllm_xargs.entropy:"),
        ({"sampling_params": {"extra_args": {"confster": "entropy=0.3"}}}, "in sampling_params.extra_args.confster:"),
        ({"vllm_xarg": {"confsteer": "entropy=0.3"}}, "in vllm_xarg.confsteer:"),
        ({"vllm_xargs": {"confsteer": {"entropy": 0.3}}}, r'send "confsteer": "{\"entropy\": 0.3}"'),
    ],
)
def test_a_steering_in_a_wrong_place_is_a_400_that_says_where_it_goes(
    server: Server, path: str, wrong: dict[str, Any], where: str
) -> None:
    answer = httpx.post(server.url + path, json={"model": "subject", **GENERATING[path], **wrong}, timeout=60)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert where in message
    assert '"vllm_xargs": {"confsteer"' in message or "vLLM takes text in vllm_xargs" in message


@pytest.mark.parametrize(
    ("headers", "body", "asked"),
    [
        ({}, '{"vllm_xargs": {"confsteer": "entropy=0.05"}}'.encode("utf-16"), "entropy=0.05"),
        ({}, b'{"vllm_xargs": {"\\u0063onfsteer": "entropy=0.05"}}', "entropy=0.05"),
        ({}, b'{"prompt": "confsteer"}', None),
        ({}, b'{"vllm_xargs": {"confsteer": "entropy=0.05"}', None),  # no JSON: for vLLM to refuse
        ({}, b'{"confsteer": ' + b"[" * 50_000, None),
        ({"content-type": "multipart/form-data; boundary=x"}, "form", "entropy=0.05"),
        ({"content-type": "multipart/form-data"}, b"confsteer", None),
        (
            {"content-type": "application/x-www-form-urlencoded"},
            b"vllm_xargs=%7B%22confsteer%22:%22entropy=0.05%22%7D",
            "entropy=0.05",
        ),
    ],
)
def test_the_door_reads_what_vllm_reads_and_leaves_the_body_to_it(headers: dict[str, str], body: Any, asked: str | None) -> None:
    """In this process: an application with a route that says what it was given."""
    from fastapi import FastAPI
    from starlette.responses import Response

    from confsteer.runtimes.vllm.front import door

    if body == "form":
        field = 'Content-Disposition: form-data; name="vllm_xargs"\r\n\r\n{"confsteer": "entropy=0.05"}'
        body = f"--x\r\n{field}\r\n--x--\r\n".encode()
    app = FastAPI()
    app.add_middleware(door.Door)
    settings = {"confsteer": {"profile": "confsteer-demo", "default": "{}"}}
    app.state.vllm_config = SimpleNamespace(additional_config=settings)
    given: list[Any] = []

    async def take(request: Any) -> Response:
        given.append((door._asked.get(), await request.body()))
        return Response()

    app.router.add_route("/anything", take, methods=["POST"])

    async def post() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            answer = await client.post("/anything", content=body, headers=headers)
        return int(answer.status_code)

    assert asyncio.run(post()) == 200
    assert given == [(asked, body)]


def request_of(steering: Any) -> bytes:
    body = {"model": "subject", "prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0}
    return json.dumps(body | {"vllm_xargs": {"confsteer": steering}}).encode()


def test_whatever_is_sent_is_steered_or_refused_with_a_sentence(server: Server) -> None:
    """And a good request gives to the last digit what it gave before. More of this: ``python eval/soak.py --minutes 0``."""
    before = server.complete("entropy=-0.2").json()["choices"]
    profile, fuzz = server.subject.profile, Fuzz(server.subject.profile, seed=0)
    values = [fuzz.value() for _ in range(1000)]
    good = [takes(profile, value) for value in values]
    assert 100 < sum(good) < 400
    for value, steers, answer in zip(values, good, send_all(server.url, map(request_of, values)), strict=True):
        assert unexpected(answer.status_code, answer.json(), good=steers) is None, value
    bodies = [fuzz.body(request_of("entropy=0.05")) for _ in range(300)]
    for body, answer in zip(bodies, send_all(server.url, bodies), strict=True):
        assert unexpected(answer.status_code, answer.json(), good=None) is None, body
    assert server.get("/health").status_code == 200
    assert server.complete("entropy=-0.2").json()["choices"] == before


def test_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    """In the middle of asking, before the answer, or in the middle of a stream."""
    before = server.complete("entropy=-0.2").json()["choices"]
    asked = [steering for steering in parity.steerings(server.subject.profile) if isinstance(steering, str)]
    host, port = server.url.removeprefix("http://").split(":")
    for i in range(36):
        body = json.loads(request_of(asked[i % len(asked)])) | {"max_tokens": 50, "ignore_eos": True, "stream": i % 2 == 0}
        content = json.dumps(body)
        message = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        message += f"Content-Length: {len(content)}\r\n\r\n{content}"
        with socket.create_connection((host, int(port))) as client:
            # Not even a goodbye.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(message.encode()[: len(message) // 2 if i % 3 == 0 else None])
            if i % 3 == 2:
                client.recv(100)
    deadline = time.monotonic() + 30
    while left := re.findall(r"^vllm:num_requests_(?:running|waiting){.*} ([1-9].*)$", server.get("/metrics").text, re.MULTILINE):
        assert time.monotonic() < deadline, left
    assert "vllm:num_requests_running{" in server.get("/metrics").text
    assert server.complete("entropy=-0.2").json()["choices"] == before


def test_after_all_that_the_server_is_well_and_exact(server: Server) -> None:
    assert server.get("/health").status_code == 200
    check_completion(server, [1, 2, 3, 4], "entropy=-0.2", server.complete("entropy=-0.2").json()["choices"][0])


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2-135M-Instruct and the profile of it that ships, made of the GGUF file that the checkpoint was written of."""
    if not REAL_CHECKPOINT.exists():
        pytest.skip(f"there is no {REAL_CHECKPOINT}: eval/vllm_real.py save writes it, of what eval/fetch_model.py fetches")
    place = tmp_path_factory.mktemp("real")
    loaded, profile = load_model(str(REAL_CHECKPOINT), device="cpu", dtype="float32"), Profile.load(REAL_PROFILE)
    subject = Subject(loaded.model, profile, REAL_CHECKPOINT, profile.save(place / "profile"))
    options = ["--served-model-name", "subject", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
    options += ["--enforce-eager", "--return-tokens-as-token-ids"]
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(place / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = server_command(str(REAL_CHECKPOINT), str(subject.profile_folder), None, options, environment)
    with serving(command.arguments, command.environment, place / "log") as url:
        yield Server(subject, url, place / "log")


@pytest.mark.real
def test_a_real_chat_model_answers_steered_as_it_does_in_transformers(real_server: Server) -> None:
    question = "What is the capital of France?"
    prompt = prompt_ids(question, load_tokenizer(str(REAL_CHECKPOINT)))
    errors, effects = {}, {}
    for steering in ("{}", "entropy=-0.5", "entropy=+0.5", "unigram=+0.5", "scale.830=-2"):
        body = {"model": "subject", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
        body |= {"logprobs": True, "top_logprobs": 5, "vllm_xargs": {"confsteer": steering}}
        (choice,) = httpx.post(real_server.url + "/v1/chat/completions", json=body, timeout=120).json()["choices"]
        content = choice["logprobs"]["content"]
        tokens = [token_id(entry["token"]) for entry in content]
        seen = {
            len(prompt) + i: {token_id(top["token"]): top["logprob"] for top in entry["top_logprobs"]}
            for i, entry in enumerate(content)
        }
        asked = None if steering == "{}" else steering
        errors[steering], effects[steering] = parity.difference(real_server.subject, prompt + tokens, len(prompt), asked, seen)
        if asked is None:
            assert "Paris" in choice["message"]["content"]
    assert max(errors.values()) < 1e-3, errors
    assert min(effect for steering, effect in effects.items() if steering != "{}") > 0.05, effects
