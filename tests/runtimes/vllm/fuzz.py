"""Whatever a client may send: values of ``vllm_xargs.confsteer``, most of them wrong, and bodies that are hardly requests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from confsteer import ConfsteerError, Profile, Steering
from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.steering import DIALS, MAX_CHARACTERS

KEYS = [*Steering.model_fields, "frequency", "", "x", "__class__", "entropy ", "ENTROPY", "entropy.entropy", "scale.scale"]
CHARACTERS = "abc019 .:=-+{}[]\",'\\/\0\x7f\t\n\u00e9\u0660\u2028\U0001f600\ud800\udfff\ufeff\u202e"
NUMBERS = ["0", "-0", "1", "0.05", "-0.01", "1e9", "1e999", "-1e-999", "nan", "inf", "-Infinity", "1_0", "٣", "0x1", "9" * 400]
POSITIONS = [
    "all",
    "generated",
    "none",
    "first:3",
    "first:0",
    "first",
    "after:",
    "after:\ud800",
    '{"after":[5,7]}',
    '{"after":[96]}',
    '{"first":2}',
]
NAME = json.dumps(CONFIG_KEY).encode()


class Fuzz:
    """Random values, the same for the same seed."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self._random = random.Random(seed)
        self._neurons = [str(neuron.index) for neuron in profile.steerable]
        self._presets = [*profile.presets, "loud", "../calm", "a" * 101]

    def value(self) -> Any:
        """Of ``confsteer``: text of the small language, JSON in a string, or anything that JSON has."""
        kinds: list[Callable[[], Any]] = [self._words, self._json_text, self._near_miss, self._text, self._anything, self._huge]
        return self._random.choices(kinds, [6, 6, 4, 2, 4, 0.2])[0]()

    def body(self, whole: bytes) -> bytes:
        """A request's body, spoiled, but for the name `CONFIG_KEY` in it: a value of another name is for vLLM alone."""
        named = whole.index(NAME)
        pick, at = self._random.choice, self._random.randrange(len(whole) - len(NAME))
        at += len(NAME) if at >= named else 0
        deep = b"[" * 20_000
        return pick(
            [
                whole[:at],
                whole[:at] + bytes([self._random.randrange(256)]) + whole[at + 1 :],
                whole[:at] + b"\0" + whole[at:],
                whole[::-1],
                whole + whole,
                b"\xff\xfe" + whole.decode().encode("utf-16-le"),
                whole.replace(b'"vllm_xargs": {', b'"vllm_xargs": [{', 1),
                whole.replace(b'"vllm_xargs": {', b'"vllm_xargs": {"confsteer": ' + deep + b', "a": {', 1),
                whole.replace(b'"prompt": [', b'"prompt": [[[', 1),
                whole.replace(
                    b'"vllm_xargs"', pick([b'"vllm_xargs": null, "x"', b'"vllm_xargs": 1, "x"', b'"vllm_xargs": "y", "x"'])
                ),
                json.dumps({"model": "subject", "prompt": [1], "vllm_xargs": self._anything()}).encode(),
                # What is no object does not get as far as confsteer; vLLM 0.27.1 answers it with a 500 of its own and hangs up.
                json.dumps({self._key(): self._anything()}).encode(),
                deep,
                b"",
            ]
        )

    def _number(self) -> str:
        draw = self._random
        return draw.choice(NUMBERS) if draw.random() < 0.4 else f"{draw.gauss(0, 1) * 10 ** draw.randint(-4, 4):g}"

    def _key(self) -> str:
        return self._random.choice([*KEYS, *self._neurons, *self._neurons, "entropy", "99999999999", "-1", "٣"])

    def _words(self) -> str:
        draw = self._random
        words = []
        for _ in range(draw.choice([0, 1, 1, 1, 2, 5])):
            operation, neuron, number = draw.choice(["scale", "shift", "clamp"]), draw.choice(self._neurons), self._number()
            words.append(
                draw.choice(
                    [
                        f"{draw.choice(list(DIALS))}={number}",
                        f"{operation}.{neuron}={number}",
                        f"clamp.{neuron}={number}:{draw.choice(['', self._number()])}",
                        f"positions={draw.choice(POSITIONS)}",
                        f"preset={draw.choice(self._presets)}",
                        f"{self._key()}.{self._key()}={number}",
                        f"{self._key()}={number}",
                        self._text(),
                    ]
                )
            )
        return draw.choice([" ", " ", "\n", "\u2003", ","]).join(words)

    def _near_miss(self) -> str:
        """A good steering with a character changed, or none."""
        good = json.dumps({self._random.choice(list(DIALS)): 0.01, "scale": {self._random.choice(self._neurons): 0.5}})
        at = self._random.randrange(-1, len(good))
        return good if at < 0 else good[:at] + self._random.choice(CHARACTERS) + good[at + 1 :]

    def _json_text(self) -> str:
        pairs = {self._key(): self._anything() for _ in range(self._random.choice([0, 1, 1, 2, 3]))}
        return json.dumps(pairs, ensure_ascii=self._random.random() < 0.5)

    def _text(self) -> str:
        return "".join(self._random.choices(CHARACTERS, k=self._random.randrange(12)))

    def _huge(self) -> Any:
        nested: Any = 0
        for _ in range(50):
            nested = self._random.choice([[nested], {"scale": nested}])
        long = "entropy=0 " * (MAX_CHARACTERS // 10)
        texts = [long, long + " ", "x" * 1_000_000, "[" * 9_000, "{" + " " * 9_000 + "}"]
        texts += ['{"scale":' * 1_000, '{"entropy":' + "9" * 9_000 + "}"]
        return self._random.choice([*texts, nested, [0] * 100_000, 10**4_000, {str(i): i for i in range(10_000)}])

    def _anything(self, depth: int = 0) -> Any:
        draw = self._random
        kind = draw.choice(["null", "boolean", "integer", "float", "text", "text"] + ["array", "object"] * (depth < 3))
        if kind == "array":
            return [self._anything(depth + 1) for _ in range(draw.randrange(4))]
        if kind == "object":
            return {self._key(): self._anything(depth + 1) for _ in range(draw.randrange(4))}
        if kind == "text":
            return draw.choice([self._text, self._number, self._key])()
        values: dict[str, list[Any]] = {
            "null": [None],
            "boolean": [True, False],
            "integer": [0, 1, -1, 2**31, 2**63, -(2**64), 10**30],
            "float": [0.01, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), draw.gauss(0, 1)],
        }
        return draw.choice(values[kind])


def takes(profile: Profile, value: Any) -> bool:
    """Whether a server must steer with what came as `value`: vLLM passes on strings, numbers and lists."""
    if not isinstance(value, str):
        return False
    try:
        profile.edit(Steering.parse(value))
    except ConfsteerError:
        return False
    return True


def send_all(url: str, bodies: Iterable[bytes], threads: int = 4) -> list[httpx.Response]:
    """Answers of ``/v1/completions``, in order; connections are kept alive.

    Raises:
        httpx.TransportError: the server hangs up, or does not answer within a minute.
    """
    # A server hangs up on connections that were idle for a while, and must not do so while one is taken up again.
    limits = httpx.Limits(max_connections=threads, keepalive_expiry=1)
    with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=limits) as client:

        def send(body: bytes) -> httpx.Response:
            return client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(send, bodies))


def unexpected(status: int, said: Any, *, good: bool | None) -> str | None:
    """What is wrong with an answer; None if nothing is.

    Args:
        status: of the answer.
        said: its JSON.
        good: whether the body's steering is; None where nobody knows.
    """
    if good is not None and (status == 200) != good:
        return f"{status} to a {'good' if good else 'wrong'} steering: {said}"
    if status == 200:
        return None
    if status != 400 and (good is not None or status != 404):  # a spoiled body may ask for another model
        return f"{status}: {said}"
    message = said["error"]["message"] if "error" in said else said["detail"]  # FastAPI's, of a body that is not text at all
    return None if isinstance(message, str) and message.strip() else f"no sentence: {said}"
