"""The door of the server: a client's steering is found, checked, and kept for everything that its request leads to.

vLLM has many routes, and each release has more. Some pass ``vllm_xargs`` on. Others drop it and make parameters of their own:
beams, batches of chats, scores. So confsteer relies on no route. Everything in the engine that comes from a client's request has
its steering.
"""

from __future__ import annotations

import copy
import functools
import json
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from confsteer.runtimes.vllm.arguments import CONFIG_KEY
from confsteer.runtimes.vllm.front.admission import admission_to
from confsteer.runtimes.vllm.front.places import HOLDERS

_asked: ContextVar[Any] = ContextVar("confsteer_asked")
"""The steering, or None, that the client asked for in the request being answered. Not set if there is no client."""


class Door:
    """The innermost middleware: others refuse unauthorised clients before it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Ask now: there was no engine yet when the application was made.
        admission = admission_to(scope["app"].state) if scope["type"] == "http" and scope["method"] == "POST" else None
        if admission is None:
            await self._app(scope, receive, send)
            return
        body, receive = await _read(receive)
        try:
            asked = admission.asked_in(await _parsed(scope, body))
        except VLLMValidationError as error:
            # Replace lone surrogates: JSON can have them as escapes, but no answer can.
            sentence = str(error).encode(errors="backslashreplace").decode()
            said = {"message": sentence, "type": "BadRequestError", "param": CONFIG_KEY, "code": 400}
            await JSONResponse({"error": said}, 400)(scope, receive, send)
            return
        token = _asked.set(asked)
        try:
            await self._app(scope, receive, send)
        finally:
            _asked.reset(token)


def install() -> None:
    """Put the door into the servers of this process, and make its engines use the steering found there."""
    build, generate = FastAPI.build_middleware_stack, AsyncLLM.generate

    @functools.wraps(build)
    def build_middleware_stack(self: Any) -> Any:
        if all(middleware.cls is not Door for middleware in self.user_middleware):
            self.user_middleware.append(Middleware(Door))
        return build(self)

    @functools.wraps(generate)
    def generate_steered(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse when called, not at the generator's first step: by then a stream would have sent 200."""
        admission = admission_to(self)
        if admission is not None:
            sampling_params = _with_asked(sampling_params)
            admission.check(sampling_params)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    FastAPI.build_middleware_stack, AsyncLLM.generate = build_middleware_stack, generate_steered
    for protocol in (ChatCompletionRequest, CompletionRequest):
        _refuse_beams_of_files(protocol)
    _refuse_windows_of_beams(BeamSearchOnlineMixin, "engine_client")
    _refuse_windows_of_beams(BeamSearchOfflineMixin, "llm_engine")


def _with_asked(params: Any) -> Any:
    """Add the client's steering to a request's ``SamplingParams``, if they have none."""
    asked, given = _asked.get(None), params.extra_args or {}
    if asked is None or CONFIG_KEY in given:
        return params
    params = copy.copy(params)  # shared: all beams have the same
    params.extra_args = {**given, CONFIG_KEY: asked}
    return params


def _refuse_beams_of_files(protocol: Any) -> None:
    """Refuse a steering that vLLM would not pass on to beams without a client at the door: in ``vllm run-batch``."""
    convert = protocol.to_beam_search_params

    @functools.wraps(convert)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        nobody_at_the_door = _asked.get(self) is self
        if nobody_at_the_door and CONFIG_KEY in (self.vllm_xargs or {}):
            raise VLLMValidationError(
                "use_beam_search does not go together with a steering of one's own in a file of requests: vLLM does not pass it "
                "on to the beams. Send it to a server, or start with a default steering"
            )
        return convert(self, *args, **kwargs)

    protocol.to_beam_search_params = to_beam_search_params


def _refuse_windows_of_beams(searcher: Any, engine: str) -> None:
    """Refuse beam search with a steering by a window, its own or the default, when the search is called."""
    search = searcher.beam_search

    @functools.wraps(search)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        admission = admission_to(getattr(self, engine))
        if admission is not None:
            admission.refuse_beams(_asked.get(None))
        return search(self, *args, **kwargs)

    searcher.beam_search = beam_search


async def _read(receive: Any) -> tuple[bytes, Any]:
    """Read the whole body of a request, and make a `receive` that gives it once more."""
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = b"".join(parts)
    # Keep the message of a client that has disconnected.
    left = [message if message["type"] != "http.request" else {"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return left.pop() if left else await receive()

    return body, again


async def _parsed(scope: Any, body: bytes) -> Any:
    """Read a body as vLLM does. None if it cannot be read, or cannot name a steering."""
    # Parse it before searching: JSON may have any character as an escape, and may be in UTF-16 or UTF-32.
    words = (CONFIG_KEY.encode(), *(name.encode() for name in HOLDERS), b"\\u00")
    if all(word not in body for word in words) and b"\0" not in body[:4]:
        return None
    request = Request(scope, _replay(body))
    try:
        if "form" in request.headers.get("content-type", ""):
            async with request.form() as form:
                return dict(form)
        return json.loads(body)
    except (HTTPException, ValueError, RecursionError):
        return None


def _replay(body: bytes) -> Any:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
