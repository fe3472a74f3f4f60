"""Whether a server stays right: mixed requests for half an hour, some of them checked against transformers.

``confsteer serve`` runs the bundled model, compiled, in float32, with a KV cache too small for the requests at hand, so that they
preempt each other. First come wrong requests (`tests/runtimes/vllm/fuzz.py`); then clients ask for random steerings, lengths,
log-probabilities and completions, whole and streamed; some cut their stream off, vanish after asking, or vanish in the middle of
asking; some ask wrongly. Now and then generation is paused and resumed, or the prefix cache is reset under running requests.

Of every thousandth answer, the log-probabilities of all tokens are compared with those of transformers and `confsteer.steer`. At
the end no request may be left in the server, and requests on their own must be answered to the last digit as at the beginning.

Resident memory is that of all processes of the server. Caches of steerings and allocators fill up at first, so a drift is what
happens after the first third of the time.

    python eval/soak.py                                 # a checkout with vLLM, see `make install-vllm`; 35 minutes
    python eval/soak.py --minutes 2 --check-every 50    # does it run?
    python eval/soak.py --minutes 0                     # wrong requests alone
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from bench_serving import Server, machine, server_environment, serving

from confsteer import Profile, Steering
from confsteer.model.loading import DEMO_NAME
from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.runtimes.vllm.front.command import server_command
from tests.runtimes.vllm import fuzz, parity

CLIENTS = 40
"""More than the KV cache has room for."""
LONGEST_PROMPT, LONGEST_ANSWER = 200, 64
OPTIONS = ["--dtype", "float32", "--max-num-seqs", "32", "--max-num-batched-tokens", "256", "--block-size", "32"]
OPTIONS += ["--num-gpu-blocks-override", "50", "--max-model-len", "512", "--return-tokens-as-token-ids"]
KINDS = {"whole": 40, "streamed": 30, "cut off": 8, "gone": 8, "half": 4, "wrong": 10}
"""What clients do, and how often of a hundred times: read the answer, whole or streamed; stop reading a stream; vanish after
asking; vanish in the middle of asking; ask wrongly."""
PROBES = 30
PROBE_SECONDS, MEMORY_SECONDS, DISTURBANCE_SECONDS = 2, 5, 20
"""From one to the next, under load."""
DRAIN_LIMIT = 60
"""Seconds."""
MOMENTS = 10
"""Parts of the time that latencies are given for."""
SHOWN = 20


class Ask(NamedTuple):
    """A request, and whether its answer is to be compared."""

    body: dict[str, Any]
    steering: str | None
    checked: bool


class Load:
    """Random requests, the same for the same seed."""

    def __init__(self, model: str, profile: Profile, seed: int, check_every: int) -> None:
        self.random = random.Random(seed)
        self._fuzz = fuzz.Fuzz(profile, seed)
        self._model, self._profile, self._check_every = model, profile, check_every
        self._asked = itertools.count(1)
        self._neurons = profile.steerable
        self._prompts: list[list[int]] = [[1]]

    def ask(self, *, streamed: bool) -> Ask:
        draw = self.random
        checked = next(self._asked) % self._check_every == 0
        temperature, n = draw.choice([(0, 1), (1, 1), (1, draw.randint(1, 3))])
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": self._prompt(),
            "max_tokens": int(LONGEST_ANSWER ** draw.random()),
            "temperature": temperature,
            "n": n,
            "ignore_eos": True,
            "stream": streamed,
            "logprobs": 5 if checked else draw.choice([None, None, 0, 5]),
        }
        if not streamed and draw.random() < 0.3:
            body["prompt_logprobs"] = 2
        steering = None if draw.random() < 0.2 else self._steering()
        if steering is not None:
            body["vllm_xargs"] = {CONFIG_KEY: steering}
        return Ask(body, steering, checked)

    def wrong(self) -> tuple[bytes, bool | None]:
        """A body, and whether it is to be answered 200; None if that is not known."""
        value = self._fuzz.value()
        body = {"model": self._model, "prompt": [1, 2, 3, 4], "max_tokens": 1, "vllm_xargs": {CONFIG_KEY: value}}
        whole = json.dumps(body).encode()
        return (whole, fuzz.takes(self._profile, value)) if self.random.random() < 0.8 else (self._fuzz.body(whole), None)

    def _prompt(self) -> list[int]:
        """Of random tokens; a third begin like another one, whose blocks may be cached."""
        draw = self.random
        start = draw.choice(self._prompts) if draw.random() < 0.33 else []
        length = int(LONGEST_PROMPT ** draw.random())
        prompt = (start + draw.choices(range(1, self._profile.model.tokenizer_size), k=length))[:LONGEST_PROMPT]
        self._prompts = [*self._prompts[-50:], prompt]
        return prompt

    def _steering(self) -> str:
        """Dials, neurons and presets in all combinations, as text or as JSON."""
        draw = self.random
        given: dict[str, Any] = {}
        for dial in self._profile.response:
            if draw.random() < 0.4:
                low, high = self._profile.reach(dial)
                given[dial] = draw.uniform(low, high)
        for neuron in draw.sample(self._neurons, draw.choice([0, 0, 1, 2, 5])):
            mean, deviation = neuron.mean_activation, neuron.std_activation
            low, high = sorted(mean + deviation * draw.gauss(0, 4) for _ in range(2))
            operation, value = draw.choice(
                [
                    ("scale", draw.uniform(-3, 3)),
                    ("shift", deviation * draw.gauss(0, 5)),
                    ("clamp", draw.choice([low, (low, high), (None, high), (low, None)])),
                ]
            )
            given.setdefault(operation, {})[neuron.index] = value
        if draw.random() < 0.2:
            given["scale"] = {"entropy": draw.uniform(0, 2)}
        if draw.random() < 0.2:
            given["preset"] = draw.choice([*self._profile.presets])
        if draw.random() < 0.25:
            given["positions"] = "generated"
        steering = Steering(**given)
        return steering.model_dump_json(exclude_defaults=True) if draw.random() < 0.5 else str(steering)


class Soak:
    """The clients of one server, and what they saw."""

    def __init__(self, server: Server, subject: parity.Subject, load: Load, session: Any) -> None:
        self._server, self._subject, self._load, self._session = server, subject, load, session
        self._start = time.monotonic()
        self._comparing = asyncio.Lock()
        self.statuses = {kind: Counter[str]() for kind in KINDS}
        self.disturbances = Counter[str]()
        self.failures: list[str] = []
        self.differences: list[parity.Difference] = []
        self.compared = 0
        self.memory: list[tuple[float, float]] = []
        """Seconds since the start, and MiB."""
        self.latencies: list[tuple[float, float]] = []
        """Seconds since the start, and milliseconds, of probes under load."""

    async def run(self, seconds: float) -> None:
        self._start = time.monotonic()
        end = self._start + seconds
        tasks = [self._client(end) for _ in range(CLIENTS)]
        tasks += [self._every(MEMORY_SECONDS, end, self.look), self._every(PROBE_SECONDS, end, self._probe)]
        tasks += [self._every(DISTURBANCE_SECONDS, end, self._disturb)]
        await asyncio.gather(*tasks)

    async def post(self, body: bytes | dict[str, Any], path: str = "/v1/completions") -> tuple[int, Any]:
        """Status of the answer, and what it says."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._server.url + path, data=content, headers=headers) as answer:
            return answer.status, await answer.json()

    async def alone(self, steering: str) -> tuple[Any, float]:
        """Answer to a fixed request, and milliseconds."""
        body = {
            "model": self._server.model,
            "prompt": list(range(10, 30)),
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
        }
        start = time.perf_counter()
        status, said = await self.post(body | {"logprobs": 5, "vllm_xargs": {CONFIG_KEY: steering}})
        assert status == 200, said
        return said["choices"], 1000 * (time.perf_counter() - start)

    async def look(self) -> None:
        self.memory.append((time.monotonic() - self._start, await asyncio.to_thread(resident, self._server.process)))

    async def drain(self) -> None:
        """Wait until the server has no request."""
        deadline = time.monotonic() + DRAIN_LIMIT
        while left := number(self._server, "vllm:num_requests_running") + number(self._server, "vllm:num_requests_waiting"):
            if time.monotonic() > deadline:
                self.failures.append(f"{left:.0f} requests are left in the server")
                return
            await asyncio.sleep(0.5)

    async def _every(self, seconds: float, end: float, do: Any) -> None:
        while time.monotonic() + seconds < end:
            await asyncio.sleep(seconds)
            await do()

    async def _probe(self) -> None:
        _, milliseconds = await self.alone("entropy=0.2")
        self.latencies.append((time.monotonic() - self._start, milliseconds))

    async def _disturb(self) -> None:
        what = self._load.random.choice(["pause", "reset"])
        self.disturbances[what] += 1
        reset = ["/reset_prefix_cache?reset_running_requests=true"]
        for path in reset if what == "reset" else ["/pause?mode=keep", "/resume"]:
            status, said = await self.post(b"", path)
            if status != 200:
                self.failures.append(f"{path}: {status} {said}")
            await asyncio.sleep(0.5)

    async def _client(self, end: float) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while time.monotonic() < end:
            [kind] = self._load.random.choices(kinds, weights)
            try:
                status = await (self._wrong() if kind == "wrong" else self._good(kind))
            except Exception as error:
                # The server hung up, or said what nobody understands; the others go on.
                status = type(error).__name__
                self.failures.append(f"{kind}: {error!r}")
            self.statuses[kind][status] += 1

    async def _wrong(self) -> str:
        body, good = self._load.wrong()
        status, said = await self.post(body)
        if failure := fuzz.unexpected(status, said, good=good):
            self.failures.append(f"wrong: {body[:200]!r}: {failure}")
        return str(status)

    async def _good(self, kind: str) -> str:
        ask = self._load.ask(streamed=kind in ("streamed", "cut off"))
        if kind in ("gone", "half"):
            return await self._vanish(ask, whole=kind == "gone")
        if not ask.body["stream"]:
            status, said = await self.post(ask.body)
            choices = said["choices"] if status == 200 else []
        else:
            status, choices = await self._stream(ask, cut_off=kind == "cut off")
        if status != 200:
            self.failures.append(f"{kind}: {status} to {ask.body}: {choices or said}")
        elif kind != "cut off":
            await self._check(ask, choices)
        return str(status)

    async def _vanish(self, ask: Ask, *, whole: bool) -> str:
        """Send a request or the first half of it, and be gone."""
        host, port = self._server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        content = json.dumps(ask.body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        message = head.encode() + b"\r\n\r\n" + content
        writer.write(message if whole else message[: len(message) // 2])
        await writer.drain()
        await asyncio.sleep(self._load.random.choice([0, 0.05, 0.5]))
        writer.transport.abort()
        return "none"

    async def _stream(self, ask: Ask, *, cut_off: bool) -> tuple[int, list[dict[str, Any]]]:
        """Status, and the choices put together again from their chunks, unless the stream is cut off."""
        patience = self._load.random.randrange(LONGEST_ANSWER) if cut_off else None
        choices: list[dict[str, Any]] = [
            {"logprobs": {"tokens": [], "top_logprobs": []}, "finish_reason": None} for _ in range(ask.body["n"])
        ]
        async with self._session.post(self._server.url + "/v1/completions", json=ask.body) as answer:
            if answer.status != 200:
                return answer.status, [{"text": await answer.text()}]
            chunks = 0
            async for line in answer.content:
                if patience is not None and chunks >= patience:
                    answer.close()
                    break
                if not line.startswith(b"data: {"):
                    continue
                chunks += 1
                chunk = json.loads(line.removeprefix(b"data: "))
                if "choices" not in chunk:
                    return int(chunk["error"]["code"]), [chunk]
                for part in chunk["choices"]:
                    for name, values in choices[part["index"]]["logprobs"].items():
                        values += (part["logprobs"] or {}).get(name) or []
                    choices[part["index"]]["finish_reason"] = part["finish_reason"]
        return 200, choices

    async def _check(self, ask: Ask, choices: Sequence[dict[str, Any]]) -> None:
        """That nothing is missing; and, if the ask says so, that it is what transformers gives."""
        reasons = [choice["finish_reason"] for choice in choices]
        if reasons != ["length"] * ask.body["n"]:
            self.failures.append(f"ended by {reasons}: {ask.body}")
            return
        if not ask.checked:
            return
        async with self._comparing:
            self.compared += 1
            for choice in choices:
                found = await asyncio.to_thread(self._difference, ask, choice)
                self.differences.append(found)
                if not found.error <= parity.TOLERANCE:
                    self.failures.append(f"off by {found.error:.1e} nats: {ask.body}")

    def _difference(self, ask: Ask, choice: dict[str, Any]) -> parity.Difference:
        prompt, logprobs = ask.body["prompt"], choice["logprobs"]
        tokens = [token_id(token) for token in logprobs["tokens"]]
        assert len(tokens) == len(logprobs["top_logprobs"]) == ask.body["max_tokens"]
        seen = {
            len(prompt) + i: {token_id(token): value for token, value in row.items()}
            for i, row in enumerate(logprobs["top_logprobs"])
        }
        for i, row in enumerate(choice.get("prompt_logprobs") or []):
            if row is not None:
                seen[i] = {int(token): value["logprob"] for token, value in row.items()}
        return parity.difference(self._subject, prompt + tokens, len(prompt), ask.steering, seen)


def number(server: Server, metric: str) -> float:
    """One of the server's metrics, which must be there."""
    value = server.metric(metric)
    assert value is not None, metric
    return value


def token_id(token: str) -> int:
    """With ``--return-tokens-as-token-ids``."""
    return int(token.removeprefix("token_id:"))


def resident(process: int) -> float:
    """MiB of a process and all its children."""
    import psutil  # comes with vLLM

    total = 0
    for one in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total / 2**20


def quantiles(milliseconds: Sequence[float]) -> dict[str, float] | None:
    """Of latencies; None of too few."""
    if len(milliseconds) < 2:
        return None
    cuts = statistics.quantiles(milliseconds, n=20, method="inclusive")
    return {"p50": round(cuts[9], 1), "p95": round(cuts[18], 1)}


def send_wrong(server: Server, profile: Profile, count: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """As many wrong values, and a quarter as many broken bodies: what came of them, and what is wrong with that."""
    load = Load(server.model, profile, seed, check_every=1)
    pairs = [load.wrong() for _ in range(count)]
    start = time.monotonic()
    answers = fuzz.send_all(server.url, [body for body, _ in pairs])
    seconds = time.monotonic() - start
    failures = [
        f"wrong: {body[:200]!r}: {failure}"
        for (body, good), answer in zip(pairs, answers, strict=True)
        if (failure := fuzz.unexpected(answer.status_code, answer.json(), good=good))
    ]
    statuses = Counter(str(answer.status_code) for answer in answers)
    return {"requests": count, "seconds": round(seconds, 1), "statuses": dict(sorted(statuses.items()))}, failures


async def soak(
    server: Server, subject: parity.Subject, seconds: float, seed: int, check_every: int
) -> tuple[dict[str, Any], list[str]]:
    """What was seen, and what was wrong."""
    import aiohttp  # comes with vLLM

    load = Load(server.model, subject.profile, seed, check_every)
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        clients = Soak(server, subject, load, session)
        probes: dict[str, list[float]] = {}
        answers: dict[str, list[Any]] = {}
        for moment in ("start", "end"):
            pairs = [await clients.alone(steering) for steering in ["{}", "entropy=0.2"] * PROBES]
            probes[moment] = [milliseconds for _, milliseconds in pairs]
            answers[moment] = [choices for choices, _ in pairs[:2]]
            await clients.look()
            if moment == "start":
                await clients.run(seconds)
                await clients.drain()
    if answers["start"] != answers["end"]:
        clients.failures.append(f"the same request on its own, before and after: {answers['start']}, {answers['end']}")
    warm = [(at, mib) for at, mib in clients.memory if at > seconds / 3]
    moments: list[list[float]] = [[] for _ in range(MOMENTS)]
    for at, milliseconds in clients.latencies:
        moments[min(int(MOMENTS * at / seconds), MOMENTS - 1)].append(milliseconds)
    seen = {
        "requests": sum(counts.total() for counts in clients.statuses.values()),
        "statuses": {kind: dict(sorted(counts.items())) for kind, counts in clients.statuses.items()},
        "disturbances": dict(clients.disturbances),
        "preemptions": number(server, "vllm:num_preemptions_total"),
        "steered_tokens": number(server, "confsteer:steered_tokens_total"),
        "compared": {
            "answers": clients.compared,
            "completions": len(clients.differences),
            "largest_error": max((found.error for found in clients.differences), default=None),
            "median_effect_of_steering": statistics.median([found.teeth for found in clients.differences] or [0.0]),
        },
        "memory_mib": {
            "start": round(clients.memory[0][1]),
            "after_warm_up": round(statistics.median(mib for _, mib in warm[: len(warm) // 4 + 1])),
            "end": round(statistics.median(mib for _, mib in warm[-(len(warm) // 4 + 1) :])),
            "over_time": [(round(at), round(mib)) for at, mib in clients.memory],
        },
        "latency_ms": {
            "start": quantiles(probes["start"]),
            "end": quantiles(probes["end"]),
            "under_load": [quantiles(part) for part in moments],
        },
    }
    return seen, clients.failures


def table(result: dict[str, Any]) -> str:
    """What one looks at first."""
    lines = [f"wrong requests first: {result['wrong_first']['statuses']}, {result['wrong_first']['seconds']} s"]
    if seen := result["soak"]:
        lines += [f"{kind}: {counts}" for kind, counts in seen["statuses"].items()]
        compared, memory, latency = seen["compared"], seen["memory_mib"], seen["latency_ms"]
        lines += [
            f"{seen['requests']:,} requests, {seen['preemptions']:,.0f} preemptions, disturbed by {seen['disturbances']}",
            f"compared with transformers: {compared['answers']} answers, largest error {compared['largest_error'] or 0:.1e} nats",
            f"memory: {memory['start']:,} MiB at the start, {memory['after_warm_up']:,} after a third of the time (the warm-up), "
            f"{memory['end']:,} at the end",
            f"a probe alone: {latency['start']} ms at the start, {latency['end']} ms at the end",
            "under load: " + ", ".join(f"{part['p50']:.0f}/{part['p95']:.0f}" for part in latency["under_load"] if part) + " ms",
        ]
    return "\n".join([*lines, f"failures: {result['failures']}"])


@click.command()
@click.option("--minutes", type=click.FloatRange(0), default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--check-every", type=click.IntRange(1), default=1000, show_default=True, help="Answers from one compared to the next."
)
@click.option("--wrong", type=click.IntRange(1), default=10_000, show_default=True, help="Wrong requests, before all others.")
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(minutes: float, seed: int, check_every: int, wrong: int, out: Path, options: tuple[str, ...]) -> None:
    """Load a server with requests of all kinds for a while, and look whether it stays right.

    OPTIONS, after --, go to the server. Exits with 1 if an answer was wrong.
    """
    # Ended by a signal, leave the contexts all the same: they stop the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subject = parity.bundled(folder)
        # The development mode has the routes that disturb.
        environment = server_environment(folder) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        given = [*OPTIONS, "--disable-uvicorn-access-log", *options]
        command = server_command(None, str(subject.profile_folder), None, given, environment)
        with serving(command, DEMO_NAME, folder / "server.log") as server:
            wrong_first, failures = send_wrong(server, subject.profile, wrong, seed)
            seen = None
            if minutes:
                seen, more = asyncio.run(soak(server, subject, 60 * minutes, seed, check_every))
                failures += more
            server.get("/health")
    result = {
        "context": {**machine(), "server_options": given, "minutes": minutes, "seed": seed, "check_every": check_every},
        "wrong_first": wrong_first,
        "soak": seen,
        "failures": len(failures),
        "first_failures": failures[:SHOWN],
    }
    out.write_text(re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(result, indent=1)) + "\n")
    click.echo(table(result))
    if failures:
        raise click.ClickException("\n".join(failure[:500] for failure in failures[:SHOWN]))


if __name__ == "__main__":
    main()
