"""Places of a steering in a client's request. Nothing here knows vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from confsteer.errors import SteeringError
from confsteer.runtimes.vllm.arguments import CONFIG_KEY, resembles
from confsteer.steering import DIALS

XARGS = ("vllm_xargs", CONFIG_KEY)
PLACES = (XARGS, ("sampling_params", "extra_args", CONFIG_KEY))
"""Right places: for most clients, and for a client that sends tokens and whole ``SamplingParams``, as Python does."""
HOLDERS = tuple(place[-2] for place in PLACES)
"""Fields that hold our key in its right places."""
WRAPPERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")
"""Fields to search for a steering: the right place, or one that is easily confused with it."""
HOW = (
    f'send "vllm_xargs": {{"{CONFIG_KEY}": "entropy=0.3"}} at the top of the body (the OpenAI client: extra_body={{"vllm_xargs": '
    f'...}}; in Python: SamplingParams(extra_args={{"{CONFIG_KEY}": ...}}))'
)


def steering_in(body: Any) -> Any:
    """Find the steering that a request's body names. None if it names none.

    Raises:
        SteeringError: it is where vLLM would drop it, or misspelt, there are two, or it is an object where vLLM takes text.
    """
    named = dict(_named(body, ()))
    for path, value in named.items():
        if path not in PLACES:
            raise SteeringError(f"nothing reads a steering in {'.'.join(path)}: {HOW}")
        if path == XARGS and isinstance(value, dict):
            text = json.dumps(json.dumps(value))
            raise SteeringError(
                f"vLLM takes text in vllm_xargs, and {CONFIG_KEY} is an object: send "
                + (f'"{CONFIG_KEY}": {text}' if len(text) <= 200 else "its JSON in a string")
            )
    if len(named) > 1:
        raise SteeringError(f"two steerings, in {' and '.join(map('.'.join, named))}: {HOW}")
    return next(iter(named.values()), None)


def _named(body: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Find every steering in a body, with the names that lead to it, as deep as clients misplace it."""
    if isinstance(body, str) and path:
        body = _from_json(body)  # as a form has it
    if not isinstance(body, dict) or len(path) > len(WRAPPERS):
        return
    for name, value in body.items():
        # A dial beside our key is one that was meant to be within it.
        misplaced = name in DIALS and bool(path) and path[-1] in HOLDERS
        if (resembles(name, CONFIG_KEY) or misplaced) and value is not None:
            yield (*path, name), value
        elif name in WRAPPERS or resembles(name, XARGS[0]):
            yield from _named(value, (*path, name))


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
