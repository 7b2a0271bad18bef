"""The server: Python's own, one thread a connection.

A request costs seconds to minutes of a model's time, so that speed of the front is no concern, and nothing has to be
installed. What matters are limits, counts and an orderly end.
"""

from __future__ import annotations

import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any

from step3vl.types import Sampling

from .batching import Batcher
from .handler import Handler
from .protocol import Limits
from .weights import Weights


class ChatServer(ThreadingHTTPServer):
    """Serves a batcher's models.

    Args:
        address: host and port; port 0 takes a free one.
        batcher: who answers.
        default: sampling of what a request does not say; its max_new_tokens is the most a request may ask for.
        limits: what a request may hold.
        api_key: what clients must send as a bearer token; "" lets everyone in.
        split_thoughts: put what stands before the closing think tag into reasoning_content.
        log: one line a request to standard error.
        weights: the model that clients may give other weights to; None: they may not.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(
        self,
        address: tuple[str, int],
        batcher: Batcher,
        default: Sampling,
        limits: Limits | None = None,
        api_key: str = "",
        split_thoughts: bool = False,
        log: bool = False,
        weights: Weights | None = None,
    ):
        self.batcher, self.default, self.limits = batcher, default, limits or Limits()
        self.api_key, self.split_thoughts, self.log = api_key, split_thoughts, log
        self.weights = weights
        self.closing = False
        self.started = int(time.time())
        self.counts = {"answered": 0, "failed": 0, "refused": 0, "gone": 0}
        """Requests by what became of them; gone: the client left first."""
        self._lock = threading.Lock()
        self._num_open = 0
        super().__init__(address, Handler)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def opened(self, change: int) -> None:
        with self._lock:
            self._num_open += change

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is the client's affair."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handle_error(request, client_address)

    def stop(self, grace_s: float = 5.0) -> bool:
        """Answer what is in flight with 503 and end; False when a call to the model is still running after that time.

        Call it where `serve_forever` does not run, or after it.
        """
        self.closing = True
        self.batcher.close()
        deadline = time.monotonic() + grace_s
        while self._num_open and time.monotonic() < deadline:
            time.sleep(0.02)
        self.server_close()
        return self.batcher.join(max(0.0, deadline - time.monotonic()))
