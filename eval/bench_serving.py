"""What steering costs a vLLM server: throughput and latency without the plugin, with it idle, and with every request steered.

Three variants, of the same OpenAI server process as ``confsteer serve`` starts, on the same randomly initialised Llama:

plain     without confsteer: not configured, and left out of ``VLLM_PLUGINS``
idle      with a profile; no request asks for steering
steered   the same server; every request asks for a steering that none before it had, so that no cache knows it

A server without confsteer and one with it take turns, never two at once; from round to round the other one comes first. Idle and
steered differ only in their requests, so one server measures both, in blocks that alternate: idle steered steered idle, or the
other way round; the plain server measures as many blocks. A round gives one number per variant, the mean of its blocks, and so
one ratio per pair of variants: idle/plain and steered/plain are of two processes, steered/idle of the same one. Reported are
medians over rounds.

Prompts are token ids, the same in all variants; prompts and answers have a fixed length, decoding is greedy, and prefix caching
is off, so all blocks are equal work. A block starts as many requests as may run at once, and another whenever one ends.

The profile is a true one of the model, as `confsteer.calibrate` makes it, but for which neurons are in it: a random model has
no entropy neurons, so those with the largest norms are put there, with a dial that is made up and not used. Cost does not
depend on what the neurons do.

``vllm bench serve`` sends one ``--extra-body`` with all requests and cannot steer each differently; its request function can.
All variants go through that, so times to the first token and between tokens are what ``vllm bench serve`` would call them.

    python eval/bench_serving.py --rounds 10                               # the model is made, nothing is downloaded
    python eval/bench_serving.py --model-shape small --rounds 1 --mode eager --requests 1       # does it run?
    python eval/bench_serving.py -- --dtype float32 --gpu-memory-utilization 0.5                # more options for the servers
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import confsteer
from confsteer import Neuron, Profile, Response
from confsteer.discovery.select import percentile
from confsteer.profile.schema import Measurement, library_versions
from confsteer.runtimes.vllm.arguments import CONFIG_KEY, CONFIG_OPTION
from confsteer.runtimes.vllm.front.command import Command, server_command

VARIANTS = ("plain", "idle", "steered")
RATIOS = (("idle", "plain"), ("steered", "plain"), ("steered", "idle"))
CONCURRENCIES = (1, 8, 64)
MODES = {"eager": ["--enforce-eager"], "compiled": []}
QUANTITIES = {
    "throughput": "tokens/s",
    "ttft": "ms to the first token",
    "itl": "ms between tokens",
    "tpot": "ms per token after the first",
}
NEURONS = 24
CONTEXT = 4096
START_LIMIT, STOP_LIMIT = 900, 30
"""Seconds that a server may take."""
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Proxies of the environment do not reach this machine's servers."""
BOOTSTRAP_ROUNDS = 6
"""From here on the interval is a bootstrap's: resampling fewer numbers says nothing about the tails."""


class Shape(NamedTuple):
    """A Llama of some size, embeddings not tied."""

    layers: int
    d_model: int
    neurons: int
    heads: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.layers} layers, d {self.d_model}, {self.neurons} neurons, {self.heads} heads, vocabulary {self.vocab:,}"


SHAPES = {"100M": Shape(12, 768, 2048, 12, 32_000), "small": Shape(2, 128, 256, 2, 512)}


class Load(NamedTuple):
    """What a block of requests is."""

    prompt_tokens: int
    output_tokens: int
    waves: int
    """Requests per concurrent one."""
    vocab: int

    def prompts(self, count: int) -> list[list[int]]:
        """The same for every block of so many requests."""
        ids: list[list[int]] = np.random.default_rng(0).integers(1, self.vocab, (count, self.prompt_tokens)).tolist()
        return ids


class Block(NamedTuple):
    """Requests of one variant, measured together."""

    variant: str
    concurrency: int
    requests: int
    seconds: float
    throughput: float
    """Tokens generated per second."""
    ttft: float
    """Milliseconds to the first token, median over requests."""
    itl: float
    """Milliseconds between tokens, median over all tokens but the first of each request. Tokens that the client finds waiting
    for it have nothing between them: where the server outruns the client, look at the next."""
    tpot: float
    """Milliseconds between the first token and the last, per token after the first; median over requests."""


class Server(NamedTuple):
    """One that answers."""

    url: str
    model: str
    process: int
    """The parent of all of its processes."""
    start_seconds: float

    def get(self, path: str) -> str:
        with LOCAL.open(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float | None:
        """One of ``/metrics``; None if the server has none of that name."""
        found = re.search(rf"^{re.escape(name)}(?:{{.*}})? ([\d.e+]+)$", self.get("/metrics"), re.MULTILINE)
        return None if found is None else float(found[1])


def build(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """The folders of a model with its tokenizer and of a profile for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    model.to(torch.float32)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", profile_for(model, tokenizer, shape.vocab).save(folder / "profile")


def profile_for(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, vocab: int) -> Profile:
    """What calibration says about the model, and the neurons of largest norm as its entropy neurons."""
    zipf = 1 / np.arange(1, vocab)
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i + 1}" for i in rng.choice(vocab - 1, 64, p=zipf / zipf.sum())) for _ in range(4)]
    # Counts of more text than these few words, which rank no vocabulary.
    counts = np.concatenate([[0], 1e6 * zipf]).astype(np.int64)
    profile = confsteer.calibrate(model, tokenizer, texts, window=64, unigram_counts=counts, source="Zipf")
    largest = profile.columns["norm"].topk(NEURONS).indices.tolist()
    nothing = (0.0, 0.0, 0.0)
    made_up = Response(
        position=(-1.0, 0.0, 1.0),
        entropy=(4.0, 5.0, 6.0),
        kl_model_unigram=nothing,
        kl_unigram_model=nothing,
        loss=nothing,
        argmax_changed=nothing,
    )
    chosen = {"entropy_neurons": tuple(neuron(profile, index) for index in largest), "frequency_neurons": ()}
    return profile.model_copy(update={**chosen, "response": {"entropy": made_up}})


def neuron(profile: Profile, index: int) -> Neuron:
    """A neuron of the layer with what calibration measured for all of them."""

    def column(name: str) -> float:
        return float(profile.columns[name][index])

    def effect(name: str) -> Measurement:
        return Measurement(value=column(name), standard_error=column(f"{name}_standard_error"))

    names = ("norm", "logit_variance", "null_fraction", "mean_activation", "std_activation", "frequency_cosine")
    effects = ("total", "direct", "loss", "entropy", "frequency")
    measured: dict[str, Any] = {name: column(name) for name in names} | {f"{name}_effect": effect(name) for name in effects}
    return Neuron(
        **measured,
        layer=profile.model.layer,
        index=index,
        sign=1 if column("entropy_slope") > 0 else -1,
        norm_percentile=float(percentile(profile.columns["norm"])[index]),
        logit_variance_percentile=float(percentile(profile.columns["logit_variance"])[index]),
        entropy_effect_abs=effect("entropy_abs"),
        mediation=effect("mediation"),
        frequency_mediation=effect("frequency_mediation"),
        argmax_changed=0.0,
    )


def without_confsteer(command: Command) -> Command:
    """The same server as if confsteer were not installed."""
    at = command.arguments.index(f"{CONFIG_OPTION}.{CONFIG_KEY}")
    plugins = [name for name in command.environment["VLLM_PLUGINS"].split(",") if name != CONFIG_KEY]
    return Command(
        command.arguments[:at] + command.arguments[at + 2 :], {**command.environment, "VLLM_PLUGINS": ",".join(plugins)}
    )


@contextlib.contextmanager
def serving(command: Command, model: str, log: Path) -> Iterator[Server]:
    """A server for the time of the context; it and all its processes are gone afterwards, however the context is left.

    Raises:
        ClickException: it does not start, or dies, with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command.arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=command.environment,
            # A group of its own: Ctrl-C comes to this process alone, which then stops the server and all its workers.
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", model, process.pid, 0.0)
    try:
        while not answers(server):
            if process.poll() is not None or time.monotonic() - start > START_LIMIT:
                raise click.ClickException("the server does not start")
            time.sleep(0.2)
        yield server._replace(start_seconds=round(time.monotonic() - start, 1))
    except Exception:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        click.echo(f"the server's log ends with:\n{tail}", err=True)
        raise
    finally:
        stop(process)


def answers(server: Server) -> bool:
    try:
        server.get("/health")
    except (urllib.error.URLError, OSError):
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group, and wait until none is left: the next server needs the memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(10 * STOP_LIMIT):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


class Client:
    """What sends the requests to one server."""

    def __init__(self, server: Server, load: Load) -> None:
        self._server = server
        self._load = load
        self._asked = 0
        """Requests that were to be steered, so that none is like another."""

    def block(self, variant: str, concurrency: int, waves: int) -> Block:
        """Measure one, of `waves` requests for each concurrent one.

        Raises:
            ClickException: a request failed or was not answered in full, or the server steered other requests than it was
                asked to.
        """
        before = self._server.metric("confsteer:steered_requests_total")
        block = asyncio.run(self._block(variant, concurrency, waves * concurrency))
        after = self._server.metric("confsteer:steered_requests_total")
        expected = None if variant == "plain" else (before or 0) + (block.requests if variant == "steered" else 0)
        if after != expected:
            raise click.ClickException(f"{variant}: the server counts {after} steered requests, and not {expected}")
        return block

    async def _block(self, variant: str, concurrency: int, count: int) -> Block:
        # Where vLLM is not installed, the message is that of server_command.
        import aiohttp
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

        room = asyncio.Semaphore(concurrency)

        async def send(prompt: list[int], session: aiohttp.ClientSession) -> Any:
            body: dict[str, Any] = {"temperature": 0.0}
            if variant == "steered":
                body["vllm_xargs"] = {CONFIG_KEY: self._steering()}
            request = RequestFuncInput(
                prompt=prompt,
                api_url=f"{self._server.url}/v1/completions",
                prompt_len=len(prompt),
                output_len=self._load.output_tokens,
                model=self._server.model,
                ignore_eos=True,
                extra_body=body,
            )
            async with room:
                return await async_request_openai_completions(request, session)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:
            start = time.perf_counter()
            outputs = await asyncio.gather(*(send(prompt, session) for prompt in self._load.prompts(count)))
            seconds = time.perf_counter() - start
        for output in outputs:
            if not output.success or output.output_tokens != self._load.output_tokens:
                raise click.ClickException(f"{variant}: a request gave {output.output_tokens} tokens. {output.error}")
        return Block(
            variant=variant,
            concurrency=concurrency,
            requests=count,
            seconds=seconds,
            throughput=count * self._load.output_tokens / seconds,
            ttft=1000 * statistics.median(output.ttft for output in outputs),
            itl=1000 * statistics.median(gap for output in outputs for gap in output.itl),
            tpot=1000 * statistics.median((output.latency - output.ttft) / (output.output_tokens - 1) for output in outputs),
        )

    def _steering(self) -> str:
        """All of the neurons scaled and shifted, as JSON, differently from every request before."""
        self._asked += 1
        return json.dumps({"scale": {"entropy": 0.5 + 1e-5 * self._asked}, "shift": {"entropy": 1e-5 * self._asked}})


def measure(server: Server, load: Load, order: Sequence[str]) -> list[Block]:
    """A warm-up and then a block of each variant in `order`, at every concurrency."""
    client, blocks = Client(server, load), []
    for concurrency in CONCURRENCIES:
        for variant in dict.fromkeys(order):
            client.block(variant, concurrency, waves=1)
        blocks += [client.block(variant, concurrency, load.waves) for variant in order]
    return blocks


def interval(ratios: Sequence[float]) -> dict[str, Any]:
    """The median ratio, and an interval for it.

    From `BOOTSTRAP_ROUNDS` rounds on: 95 %, percentiles of a bootstrap over rounds. With n rounds fewer than that: from the
    smallest ratio to the largest, which has the median between with a probability of 1 − 2^(1−n) whatever the ratios'
    distribution; None for one round.
    """
    n, median = len(ratios), statistics.median(ratios)
    if n >= BOOTSTRAP_ROUNDS:
        resampled = np.median(np.random.default_rng(0).choice(ratios, (10_000, n)), axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return {"median": median, "interval": [float(low), float(high)], "level": 0.95, "kind": "bootstrap percentile"}
    if n == 1:
        return {"median": median, "interval": None, "level": None, "kind": "one round"}
    return {"median": median, "interval": [min(ratios), max(ratios)], "level": 1 - 2.0 ** (1 - n), "kind": "range"}


def summarise(rounds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per mode, concurrency and quantity: each variant's median over rounds, and the paired ratios."""
    rows = []
    for mode in dict.fromkeys(one["mode"] for one in rounds):
        for concurrency in CONCURRENCIES:
            for quantity in QUANTITIES:
                values: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
                for one in (one for one in rounds if one["mode"] == mode):
                    for variant, seen in values.items():
                        of_variant = [b for b in one["blocks"] if (b["variant"], b["concurrency"]) == (variant, concurrency)]
                        seen.append(statistics.mean(block[quantity] for block in of_variant))
                rows.append(
                    {
                        "mode": mode,
                        "concurrency": concurrency,
                        "quantity": quantity,
                        "rounds": len(values["plain"]),
                        **{variant: statistics.median(seen) for variant, seen in values.items()},
                        **{
                            f"{one}/{other}": interval([a / b for a, b in zip(values[one], values[other], strict=True)])
                            for one, other in RATIOS
                        },
                    }
                )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary in markdown."""
    names = [f"{one}/{other}" for one, other in RATIOS]
    lines = [
        f"| mode | concurrency | | {' | '.join((*VARIANTS, *names))} |",
        "|---|---|---|" + "---|" * (len(VARIANTS) + len(names)),
    ]
    for row in rows:
        cells = [row["mode"], str(row["concurrency"]), QUANTITIES[row["quantity"]]]
        cells += [f"{row[variant]:.4g}" for variant in VARIANTS]
        for name in names:
            ends = row[name]["interval"]
            cells.append(f"{row[name]['median']:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})"))
        lines.append(f"| {' | '.join(cells)} |")
    level, kind = rows[0][names[0]]["level"], rows[0][names[0]]["kind"]
    meaning = {
        "bootstrap percentile": f"{level or 0:.0%} interval of the median, percentiles of a bootstrap over rounds",
        "range": f"smallest and largest ratio, the median is between them with a probability of {level or 0:.0%}",
        "one round": "one round: no interval",
    }[kind]
    return "\n".join([*lines, "", f"Medians of {rows[0]['rounds']} rounds; ratios paired by round; in brackets: {meaning}."])


def machine() -> dict[str, Any]:
    """What the numbers were taken with, and on what."""
    distribution = importlib.metadata.packages_distributions()["vllm"][0]
    cpu = Path("/proc/cpuinfo")
    model_names = re.findall(r"^model name\s*: (.*)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else []
    return {
        "versions": {
            **library_versions(),
            "vllm": f"{distribution} {importlib.metadata.version(distribution)}",
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": model_names[0] if model_names else platform.processor(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def context(shape: Shape, load: Load, options: Sequence[str]) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        **machine(),
        "shape": {**shape._asdict(), "steered_neurons": NEURONS},
        "load": load._asdict(),
        "server_options": list(options),
    }


def server_environment(folder: Path) -> dict[str, str]:
    """That of a server which leaves its compiled graphs and sockets in `folder`."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        **os.environ,
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TMPDIR": str(folder),
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--requests", type=click.IntRange(1), default=4, show_default=True, help="Per block and concurrent request.")
@click.option("--prompt-tokens", type=click.IntRange(1, CONTEXT // 2), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(2, CONTEXT // 2), default=64, show_default=True)
@click.option("--mode", type=click.Choice([*MODES, "both"]), default="both", show_default=True)
@click.option("--model-shape", type=click.Choice(list(SHAPES)), default="100M", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), default=Path(__file__).with_suffix(".json"))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    rounds: int,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    mode: str,
    model_shape: str,
    out: Path,
    options: tuple[str, ...],
) -> None:
    """Measure throughput and latency of a vLLM server without confsteer, with it idle, and with every request steered.

    OPTIONS, after --, go to the servers. What is measured is written after each round.
    """
    # Ended by a signal, leave the contexts all the same: they stop the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    shape = SHAPES[model_shape]
    load = Load(prompt_tokens, output_tokens, requests, shape.vocab)
    modes = list(MODES) if mode == "both" else [mode]
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # The graphs compiled in the first round serve the others.
        environment = server_environment(folder)
        model, profile = build(shape, folder)
        # What made the model is not to be walked through while times are taken.
        gc.collect()
        gc.freeze()
        common = ["--served-model-name", "random", "--max-model-len", str(prompt_tokens + output_tokens)]
        common += ["--no-enable-prefix-caching", "--seed", "0", *options]
        for number in range(rounds):
            for one in modes:
                configured = server_command(str(model), str(profile), None, [*common, *MODES[one]], environment)
                # Which server and which variant come first, in every combination.
                pair = ["idle", "steered"][:: (-1) ** (number // 2)]
                servers = [("plain", without_confsteer(configured), ["plain"] * 4), (CONFIG_KEY, configured, pair + pair[::-1])]
                blocks, start_seconds = [], {}
                for name, command, order in servers[:: (-1) ** number]:
                    click.echo(f"round {number + 1} of {rounds}, {one}, {name}", err=True)
                    with serving(command, "random", folder / "server.log") as server:
                        start_seconds[name] = server.start_seconds
                        blocks += measure(server, load, order)
                done.append(
                    {
                        "round": number,
                        "mode": one,
                        "start_seconds": start_seconds,
                        "blocks": [
                            {n: round(v, 4) if isinstance(v, float) else v for n, v in block._asdict().items()}
                            for block in blocks
                        ],
                    }
                )
                result = {"context": context(shape, load, common), "summary": summarise(done), "rounds": done}
                out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(table(summarise(done)))


if __name__ == "__main__":
    main()
