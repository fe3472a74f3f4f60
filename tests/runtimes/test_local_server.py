"""The small server of a steered transformers model, asked over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import PreTrainedModel

import confsteer
from confsteer import Profile, SettingError, Steering
from confsteer.cli import main
from confsteer.demo import Demo
from confsteer.runtimes.completions import Completions
from confsteer.runtimes.local_server import HOST, LocalServer
from confsteer.text.windows import prompt_ids

PROMPT = "It was the best of times, it was"
TOKENS = 12


@contextlib.contextmanager
def serving(demo: Demo, profile: Profile | None = None) -> Iterator[LocalServer]:
    """A server of a model, for the time of the context."""
    profile = profile or demo.profile
    with (
        confsteer.steer(demo.model, profile) as steerer,
        LocalServer(Completions(demo.model, demo.tokenizer, steerer), profile, 0) as server,
    ):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def demo() -> Demo:
    return confsteer.demo.load()


@pytest.fixture(scope="module")
def server(demo: Demo) -> Iterator[LocalServer]:
    with serving(demo) as found:
        yield found


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    """The model once more, for the server steers its own."""
    return confsteer.demo.load().model


def send(server: LocalServer, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=60)
    payload = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = ({} if body is None else {"Content-Type": "application/json"}) | headers
    connection.request("GET" if body is None else "POST", path, payload, given)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def complete(server: LocalServer, steering: str, **options: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "logprobs": 5, "vllm_xargs": {"confsteer": steering}} | options
    status, answer, _ = send(server, "/v1/completions", body)
    assert status == 200, answer
    choice: dict[str, Any] = json.loads(answer)["choices"][0]
    return choice


def stream(server: LocalServer, steering: str, **options: Any) -> list[dict[str, Any]]:
    body = {
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "logprobs": 5,
        "stream": True,
        "vllm_xargs": {"confsteer": steering},
    } | options
    status, answer, headers = send(server, "/v1/completions", body)
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    *events, done, nothing = answer.decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]


@pytest.mark.parametrize("steering", ["neutral", "entropy=0.9", '{"entropy": -0.1, "scale": {"767": 0}}'])
def test_an_answer_has_the_predictions_that_steering_gives(
    demo: Demo, server: LocalServer, other: PreTrainedModel, steering: str
) -> None:
    choice = complete(server, steering, seed=3)
    given = prompt_ids(PROMPT, demo.tokenizer, chat=False)
    ids = [*given, *demo.tokenizer(choice["text"])["input_ids"]]
    with torch.no_grad(), confsteer.steer(other, demo.profile, Steering.parse(steering)):
        log_p = other(torch.tensor([ids])).logits[0, len(given) - 1 : -1].log_softmax(-1)
    chosen = log_p.gather(1, torch.tensor(ids[len(given) :])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(choice["logprobs"]["token_logprobs"]), chosen, atol=1e-4, rtol=0)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    torch.testing.assert_close(torch.tensor(choice["confsteer"]["entropies"]), entropy, atol=1e-4, rtol=0)
    for row, top in zip(log_p, choice["logprobs"]["top_logprobs"], strict=True):
        assert list(top.values()) == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


def test_a_stream_is_the_same_answer_in_pieces(server: LocalServer) -> None:
    whole, pieces = complete(server, "entropy=0.5", seed=1), stream(server, "entropy=0.5", seed=1)
    assert len(pieces) == TOKENS
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (TOKENS - 1) + ["length"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_clients_at_once_get_what_each_gets_alone(server: LocalServer) -> None:
    asked = ["neutral", "entropy=0.9", "unigram=0.3", "entropy=-0.1", "neutral", "scale.767=3"]
    alone = [complete(server, steering, seed=i) for i, steering in enumerate(asked)]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda job: complete(server, job[1], seed=job[0]), enumerate(asked)))
    assert together == alone
    assert len({choice["text"] for choice in alone}) == len(asked)


def test_to_an_answer_all_positions_are_those_that_generate(server: LocalServer) -> None:
    assert complete(server, "entropy=0.9 positions=generated", seed=2) == complete(server, "entropy=0.9", seed=2)


def test_a_window_steers_the_choice_of_its_tokens_alone(server: LocalServer) -> None:
    def tokens(steering: str) -> list[Any]:
        found = complete(server, steering, temperature=0)
        return list(zip(found["logprobs"]["tokens"], found["confsteer"]["entropies"], strict=True))

    steered, plain = tokens("entropy=0.9"), tokens("neutral")
    first = tokens("entropy=0.9 positions=first:3")
    assert first[:3] == steered[:3]
    marker = "".join(name for name, _ in plain[:3])
    after = tokens(json.dumps({"entropy": 0.9, "positions": {"after": marker}}))
    assert after[:3] == plain[:3]
    # The first predictions outside and inside, of the same tokens before.
    assert after[3][1] != plain[3][1]
    assert first[3][1] != steered[3][1]
    status, answer, _ = send(server, "/v1/completions", {"prompt": PROMPT, "vllm_xargs": {"confsteer": "positions=after:"}})
    assert status == 400
    assert "a marker is 1 to 200 characters" in json.loads(answer)["error"]["message"]


def test_the_same_seed_draws_other_tokens_only_where_predictions_differ(server: LocalServer) -> None:
    """A push too small to change a draw leaves the answer; greedy answers need no seed."""
    assert complete(server, "entropy=0.0001", seed=5)["text"] == complete(server, "neutral", seed=5)["text"]
    assert complete(server, "neutral", seed=6)["text"] != complete(server, "neutral", seed=5)["text"]
    assert complete(server, "neutral", temperature=0, seed=1) == complete(server, "neutral", temperature=0, seed=2)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"vllm_xargs": {"confsteer": "entropy=9"}}, "entropy=+9 is out of reach"),
        ({"vllm_xargs": {"confsteer": {"entropy": 0.1}}}, "vllm_xargs.confsteer: Input should be a valid string"),
        ({"vllm_xargs": {"steering": "entropy=0.1"}}, "vllm_xargs.steering: Extra inputs are not permitted"),
        ({"confsteer": "entropy=0.1"}, "confsteer: Extra inputs are not permitted"),
        ({"n": 2}, "n: Extra inputs are not permitted"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 600}, "more than the model's 512"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": ""}, "the prompt has no tokens"),
    ],
)
def test_a_wrong_request_is_a_400_before_a_stream_begins(server: LocalServer, changed: dict[str, Any], sentence: str) -> None:
    for streamed in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 2, "stream": streamed} | changed
        status, answer, _ = send(server, "/v1/completions", body)
        assert status == 400
        assert sentence in json.loads(answer)["error"]["message"]
    complete(server, "neutral")


def test_what_a_page_of_a_stranger_could_send_is_refused(server: LocalServer) -> None:
    """By a name that leads here, or as a form, which browsers send without asking first."""
    body = {"prompt": PROMPT, "max_tokens": 2}
    for path, given in (("/confsteer", None), ("/confsteer/play", None), ("/v1/completions", body)):
        for host in ("example.com", f"example.com:{server.server_port}", "127.0.0.1"):
            assert send(server, path, given, Host=host)[0] == 403
        assert send(server, path, given, Host=f"localhost:{server.server_port}")[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert send(server, "/v1/completions", body, **{"Content-Type": kind})[0] == 415
    for headers in send(server, "/confsteer/play")[2], send(server, "/confsteer")[2]:
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert headers["X-Frame-Options"] == "DENY"


def test_other_requests(demo: Demo, server: LocalServer) -> None:
    assert send(server, "/")[2]["Location"] == "/confsteer/play"
    said = json.loads(send(server, "/confsteer")[1])
    assert said["dials"]["entropy"]["range"] == list(demo.profile.reach("entropy"))
    assert json.loads(send(server, "/v1/models")[1])["data"][0]["id"] == said["model"] == "confsteer-demo"
    assert send(server, "/none")[0] == send(server, "/v1/none", {})[0] == 404
    assert send(server, "/v1/completions", b"{" * 1000)[0] == 400
    for length in ("1000001", "-1", "many"):
        assert send(server, "/v1/completions", b"", **{"Content-Length": length})[0] == 400


def test_a_port_that_is_taken_is_a_sentence(server: LocalServer) -> None:
    with pytest.raises(SettingError, match="Give another with --port"):
        LocalServer(server.completions, Profile.load("confsteer-demo"), server.server_port)
    result = CliRunner().invoke(main, ["play", "-p", "confsteer-demo", "--port", str(server.server_port)])
    assert result.exit_code == 1
    assert f"cannot listen on port {server.server_port}" in result.output
