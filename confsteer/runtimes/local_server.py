"""A small server of one steered transformers model, for one person: the page, and the completions that it asks for.

It listens only on this machine. A browser may have pages of other sites open beside it. They cannot send JSON here: the browser
asks first, and the server does not answer. Nor can they use a name of their own for this machine: the server accepts only its
own names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import ValidationError

from confsteer.errors import ConfsteerError, SettingError, first_problem
from confsteer.playground.description import describe, public_name
from confsteer.playground.page import PATH, page
from confsteer.profile.profile import Profile
from confsteer.runtimes.completions import CompletionRequest, Completions, Token

HOST = "127.0.0.1"
MAX_BODY = 1_000_000
"""Most bytes of a request."""


class LocalServer(ThreadingHTTPServer):
    """The server. `serve_forever` answers until `shutdown` or an interrupt.

    Args:
        completions: the model.
        profile: the model's profile.
        port: port to listen on; 0 for a free one.

    Raises:
        SettingError: the server cannot listen on the port.
    """

    daemon_threads = True

    def __init__(self, completions: Completions, profile: Profile, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise SettingError(f"cannot listen on port {port}: {error.strerror}. Give another with --port") from error
        self.completions = completions
        self.description = describe(profile)
        self.model = public_name(profile.model.id)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}{PATH}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write no log: the terminal belongs to the user of the page."""

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        models = {"object": "list", "data": [{"id": self.server.model, "object": "model"}]}
        answers = {"/confsteer": self.server.description, "/v1/models": models}
        if self.path == "/":
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", PATH)
            self.end_headers()
        elif self.path == PATH:
            self._send(HTTPStatus.OK, page().encode(), "text/html; charset=utf-8")
        elif self.path in answers:
            self._send_json(HTTPStatus.OK, answers[self.path])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path[:80]} here; the page is at {PATH}")

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        if self.path != "/v1/completions":
            self._refuse(HTTPStatus.NOT_FOUND, f"nothing answers {self.path[:80]} here; completions are at /v1/completions")
            return
        try:
            request = CompletionRequest.model_validate_json(self._body())
            tokens = self.server.completions.start(request)
        except ValidationError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, first_problem(error, whole="request"))
            return
        except ConfsteerError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        if request.stream:
            self._stream(tokens)
        else:
            self._send_json(HTTPStatus.OK, self._answer([*tokens]))

    def _is_for_us(self) -> bool:
        """Whether no page of another site could have sent the request. Otherwise it is refused."""
        if self.headers.get("Host") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"this server is {self.server.url}, and answers to no other name")
        elif self.command == "POST" and self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON, as application/json")
        else:
            return True
        return False

    def _body(self) -> bytes:
        """Read the body of the request.

        Raises:
            SettingError: it does not give its length, or is too long.
        """
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length) <= MAX_BODY):
            raise SettingError(f"a request needs a Content-Length, of at most {MAX_BODY:,} bytes")
        return self.rfile.read(int(length))

    def _stream(self, tokens: Iterator[Token]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            for token in tokens:
                self.wfile.write(f"data: {json.dumps(self._answer([token]))}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            return  # who has gone wants no more

    def _answer(self, tokens: list[Token]) -> dict[str, Any]:
        """Write tokens as an OpenAI completion, with their entropies added."""
        choice = {
            "index": 0,
            "text": "".join(token.text for token in tokens),
            "logprobs": {
                "tokens": [token.name for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [token.top for token in tokens],
            },
            "confsteer": {"entropies": [token.entropy for token in tokens]},
            "finish_reason": tokens[-1].ends if tokens else "stop",
        }
        return {"object": "text_completion", "model": self.server.model, "choices": [choice]}

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._send_json(status, {"error": {"message": message, "type": status.phrase, "code": status.value}})

    def _send_json(self, status: HTTPStatus, said: Any) -> None:
        self._send(status, json.dumps(said).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(body)
