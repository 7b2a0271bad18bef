"""One connection: requests are read within limits, answers leave as JSON or as server-sent events.

Errors have the protocol's form. A client that hangs up while it waits is noticed, and its request is given up.
"""

from __future__ import annotations

import hmac
import json
import queue
import select
import socket
import sys
import time
import uuid
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from .backends import Said
from .batching import Closing, Full, Job
from .protocol import Refused, Request, read_request
from .replies import answer, content, finish, piece, usage

if TYPE_CHECKING:
    from .server import ChatServer

POLL_S = 0.25
KEEP_ALIVE_S = 10.0
"""A comment is sent this often to a client that waits for a stream."""
MODEL_FAULTS = (500, 502)
"""Statuses of requests that were in order; they count as failed, not as refused."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "step3vl"
    sys_version = ""
    timeout = 60  # seconds without a byte from a client that is sending
    server: ChatServer

    def do_GET(self) -> None:
        models = list(self.server.batcher.backends)
        if self.place == "/health":
            batcher = self.server.batcher
            state = {"status": "closing" if self.server.closing else "ok", **self.server.counts}
            state |= {"waiting": batcher.num_waiting, "running": batcher.num_running, "calls": batcher.num_calls}
            return self._reply(503 if self.server.closing else 200, state)
        try:
            self._authorise()
            if self.place == "/v1/models":
                return self._reply(200, {"object": "list", "data": [self._card(name) for name in models]})
            if self.place == "/get_model_info" and self.server.weights is not None:
                return self._reply(200, self.server.weights.info())
            if self.place.removeprefix("/v1/models/") in models:
                return self._reply(200, self._card(self.place.removeprefix("/v1/models/")))
            raise Refused(404, f"there is nothing at {self.path[:200]!r}; try /v1/models", "not_found")
        except Refused as refused:
            return self._refuse(refused)

    def do_POST(self) -> None:
        self.server.opened(1)
        start_s = time.monotonic()
        try:
            try:
                body = self._body()
                self._authorise()
                if self.place == "/update_weights_from_disk":
                    return self._update(body)
                if self.place != "/v1/chat/completions":
                    raise Refused(
                        404, f"there is nothing at {self.path[:200]!r}; try /v1/chat/completions", "not_found"
                    )
                if self.server.closing:
                    raise shutting_down()
                if self.server.weights is not None and self.server.weights.broken:
                    raise Refused(503, self.server.weights.broken, "weights_broken")
                models = list(self.server.batcher.backends)
                request = read_request(body, models, self.server.default, self.server.limits)
                self._chat(request)
            except Refused as refused:
                self.server.count("failed" if refused.status in MODEL_FAULTS else "refused")
                self._refuse(refused)
            except (ConnectionError, TimeoutError):
                self.server.count("gone")
                self.close_connection = True
        finally:
            self.server.opened(-1)
            if self.server.log:
                print(f"POST {self.path[:60]} {time.monotonic() - start_s:.1f} s", file=sys.stderr)

    @property
    def place(self) -> str:
        """The path without a query."""
        return self.path.partition("?")[0]

    # ------------------------------------------------------------------------------------------------ a request

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            self.close_connection = True
            raise Refused(411, "Content-Length is needed", "length_required")
        size, most = int(length), self.server.limits.max_body_bytes
        if size > most:
            self.close_connection = True
            left = min(size, 4 * most)
            while left > 0 and (read := len(self.rfile.read(min(left, 2**20)))):  # so that the client reads the answer
                left -= read
            raise Refused(413, f"the body has {size} bytes; accepted are up to {most}", "body_too_large")
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client left in mid-sentence")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type must be application/json", "unsupported_media_type")
        return body

    def _authorise(self) -> None:
        said = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.api_key and not hmac.compare_digest(said.encode(), self.server.api_key.encode()):
            raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

    def _update(self, body: bytes) -> None:
        """Other weights for the model, once the calls that run have ended."""
        weights = self.server.weights
        if weights is None:
            raise Refused(403, "this server keeps its weights; start it with --weights-from FOLDER", "forbidden")
        path = weights.read(body)
        try:
            found = self.server.batcher.alone(lambda: weights.load(path))
        except Closing:
            raise shutting_down() from None
        self._reply(200, found)

    def _chat(self, request: Request) -> None:
        batcher = self.server.batcher
        try:
            batcher.backends[request.model].check(request.sampling)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        whole = request.n > 1 or self.server.split_thoughts
        job = Job(
            model=request.model,
            prompt=request.prompt,
            sampling=request.sampling,
            n=request.n,
            wants_pieces=request.stream and not whole,
        )
        try:
            batcher.submit(job)
        except Closing:
            raise shutting_down() from None
        except Full:
            raise Refused(429, f"{batcher.max_waiting} requests wait already", "queue_full") from None
        id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        try:
            if request.stream:
                self._stream(job, request, id, created)
            else:
                said = self._wait(job)
                self._reply(200, answer(id, created, request, said, self.server.split_thoughts))
                self.server.count("answered")
        except (ConnectionError, TimeoutError):
            job.abandoned = True
            raise

    def _wait(self, job: Job) -> list[Said]:
        """The job's answers. Raises Refused where there are none, ConnectionError where the client has left."""
        while True:
            try:
                event = job.events.get(timeout=POLL_S)
            except queue.Empty:
                self._check_client()
                continue
            if not isinstance(event, str):
                return self._judge(event)

    def _judge(self, event: list[Said] | Exception) -> list[Said]:
        if isinstance(event, Closing):
            raise shutting_down()
        if isinstance(event, ValueError):
            raise Refused(400, str(event))
        if isinstance(event, Exception):
            raise Refused(500, f"the model failed: {type(event).__name__}: {event}", "model_failed")
        if all(said.completion.error is not None for said in event):
            raise Refused(502, f"no answer: {event[0].completion.error}", "upstream_failed")
        return event

    def _check_client(self) -> None:
        """Raises ConnectionError when the client has hung up."""
        poll = select.poll()  # select.select knows the first 1,024 files alone
        poll.register(self.connection, select.POLLIN)
        if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError("the client hung up")

    # ------------------------------------------------------------------------------------------------ streams

    def _stream(self, job: Job, request: Request, id: str, created: int) -> None:
        """Server-sent events: comments while nothing comes, pieces, what was used, [DONE]. An error ends the stream."""
        first = self._next(job, KEEP_ALIVE_S / 5)  # what fails at once is an ordinary error, with a status
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")):
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        model, number, begun = request.model, 0, set()

        def tell(index: int, delta: dict[str, Any], end: str | None = None) -> None:
            if index not in begun:
                begun.add(index)
                delta = {"role": "assistant", **delta}
            self._event(piece(id, created, model, index, delta, end))

        event: str | list[Said] | None = first
        streamed = False
        try:
            while not isinstance(event, list):
                if event is None:
                    self._chunk(b": waiting\n\n")
                else:
                    streamed = True
                    tell(0, {"content": event})
                event = self._next(job)
        except Refused as refused:
            self.server.count("failed" if refused.status in MODEL_FAULTS else "refused")
            self._event(refused.body())
            return self._chunk(b"")
        for said in event:
            if said.completion.error is not None:
                continue
            if not streamed:
                for name, text in content(said.completion.text, self.server.split_thoughts).items():
                    tell(number, {name: text})
            tell(number, {}, finish(said.completion))
            number += 1
        if num_failed := sum(said.completion.error is not None for said in event):
            self._chunk(f": {num_failed} of {len(event)} answers failed\n\n".encode())
        if request.include_usage:
            last = piece(id, created, model, 0, {}, None)
            self._event(last | {"choices": [], "usage": usage(event)})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        return self.server.count("answered")

    def _next(self, job: Job, wait_s: float = KEEP_ALIVE_S) -> str | list[Said] | None:
        """The next event; None after a while without one."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            try:
                event = job.events.get(timeout=POLL_S)
            except queue.Empty:
                self._check_client()
                continue
            return event if isinstance(event, str) else self._judge(event)
        return None

    def _event(self, body: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(body).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        """A chunk of the body; an empty one ends it."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    # ------------------------------------------------------------------------------------------------ replies

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.server.started, "owned_by": "step3vl"}

    def _refuse(self, refused: Refused) -> None:
        self._reply(refused.status, refused.body())

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, in the protocol's form."""
        self.close_connection = True
        self._reply(code, Refused(code, message or "the request cannot be read").body())

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are logged whole, in do_POST."""


def shutting_down() -> Refused:
    """What every request is told at the end."""
    return Refused(503, "the server is shutting down", "shutting_down")
