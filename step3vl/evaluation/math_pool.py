"""math-verify behind killable processes: is a free-form answer mathematically the gold answer?

math-verify guards itself with alarms, which work in a main thread only, and some answers hold sympy for minutes. Here
each answer is judged in a process of its own kind, the clock is the caller's, and a judge that is late is killed and
replaced without the others noticing. Needs the optional package: pip install 'step3vl[rl]'.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .extract import final_text

MAX_CHARACTERS = 100_000  # of the final text; longer answers are wrong unread
ANSWERS_A_JUDGE = 500  # then it is replaced, so that sympy's caches never meet the memory limit
START_S = 120.0  # to import sympy on a busy machine


@dataclass(slots=True)
class _Judge:
    pid: int
    connection: socket.socket
    pair: int = -1
    """Index of the pair being judged; -1: idle."""
    deadline: float = 0.0
    num_answers: int = 0


class MathPool:
    """Judges in processes. Safe in any thread; several threads share the judges.

    Args:
        num_workers: judges at work at once.
        timeout_s: seconds that one answer may take, on the caller's clock.
        memory_mb: address space of one judge.
    """

    def __init__(self, num_workers: int = 2, timeout_s: float = 5.0, memory_mb: int = 1024):
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"MathPool needs num_workers >= 1 and timeout_s > 0, got {num_workers} and {timeout_s}")
        self.timeout_s, self.memory_mb = timeout_s, memory_mb
        self.num_timeouts = 0
        """Answers that were not judged in time."""
        self.num_crashes = 0
        """Answers that ended their judge, for example for want of memory."""
        self._lock = threading.Lock()
        self._idle: queue.Queue[_Judge] = queue.Queue()
        self._open_nursery()
        for _ in range(num_workers):
            self._idle.put(self._new_judge())

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """For each (model's text, gold answer): equal, not equal, or None where it could not be judged in time.

        Think text is stripped, the gold is read as LaTeX maths. Empty and over-long answers are wrong unread.
        """
        verdicts: list[bool | None] = [None] * len(pairs)
        waiting: deque[tuple[int, bytes]] = deque()
        for k, (text, gold) in enumerate(pairs):
            said = final_text(text)
            if not said or len(said) > MAX_CHARACTERS:
                verdicts[k] = False
            else:
                waiting.append((k, json.dumps([said, gold if "$" in gold else f"${gold}$"]).encode()))
        if waiting:
            with self._borrow(len(waiting)) as judges, selectors.DefaultSelector() as selector:
                self._work(judges, waiting, verdicts, selector)
        return verdicts

    def close(self) -> None:
        """End every process. The pool cannot be used afterwards."""
        self._control.close()  # the nursery sees it and ends its judges
        try:
            self._nursery.wait(5)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().connection.close()

    def __enter__(self) -> MathPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(
        self,
        judges: list[_Judge],
        waiting: deque[tuple[int, bytes]],
        verdicts: list[bool | None],
        selector: selectors.BaseSelector,
    ) -> None:
        for place, judge in enumerate(judges):
            selector.register(judge.connection, selectors.EVENT_READ, place)
            self._give(judge, waiting)
        while any(judge.pair >= 0 for judge in judges):
            earliest = min(judge.deadline for judge in judges if judge.pair >= 0)
            ready = {key.data for key, _ in selector.select(max(0.0, earliest - time.monotonic()))}
            now = time.monotonic()
            for place, judge in enumerate(judges):
                if judge.pair < 0 or (place not in ready and now < judge.deadline):
                    continue
                reply = b""
                if place in ready:
                    with contextlib.suppress(OSError):
                        reply = judge.connection.recv(1)
                    verdicts[judge.pair] = reply == b"1" if reply else None
                    self.num_crashes += not reply
                else:
                    self.num_timeouts += 1
                judge.num_answers += 1
                if reply and judge.num_answers < ANSWERS_A_JUDGE:
                    judge.pair = -1
                else:
                    selector.unregister(judge.connection)
                    judge = judges[place] = self._replace(judge)
                    selector.register(judge.connection, selectors.EVENT_READ, place)
                self._give(judge, waiting)

    def _give(self, judge: _Judge, waiting: deque[tuple[int, bytes]]) -> None:
        if waiting:
            judge.pair, request = waiting.popleft()
            judge.deadline = time.monotonic() + self.timeout_s
            with contextlib.suppress(OSError):  # a judge that is gone is noticed when it is read
                judge.connection.sendall(struct.pack(">I", len(request)) + request)

    @contextlib.contextmanager
    def _borrow(self, count: int) -> Iterator[list[_Judge]]:
        """At least one judge, and up to `count` that are idle now; those left busy by an error are replaced."""
        judges = [self._idle.get()]
        with contextlib.suppress(queue.Empty):
            while len(judges) < count:
                judges.append(self._idle.get_nowait())
        try:
            yield judges
        finally:
            for judge in judges:
                self._idle.put(judge if judge.pair < 0 else self._replace(judge))

    def _replace(self, judge: _Judge) -> _Judge:
        judge.connection.close()
        self._ask(str(judge.pid).encode())
        return self._new_judge()

    def _new_judge(self) -> _Judge:
        ours, theirs = socket.socketpair()
        with theirs:
            return _Judge(int(self._ask(b"fork", theirs)), ours)

    def _ask(self, message: bytes, connection: socket.socket | None = None) -> str:
        with self._lock:
            try:
                socket.send_fds(self._control, [message], [connection.fileno()] if connection else [])
                return self._hear()
            except OSError as error:
                raise RuntimeError(f"the process that keeps math-verify is gone: {error}") from error

    def _hear(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            piece = self._control.recv(4096)
            if not piece:
                raise RuntimeError("the process that keeps math-verify ended without a word")
            line += piece
        return line.decode().strip()

    def _open_nursery(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_S)
        worker = str(Path(__file__).with_name("math_worker.py"))
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-P", worker, str(theirs.fileno()), str(self.memory_mb)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        if (word := self._hear()) != "ready":
            self.close()
            if "No module named" in word:
                raise ImportError("scoring maths needs math-verify: pip install 'step3vl[rl]' (or math-verify>=0.9)")
            raise RuntimeError(f"math-verify could not be started: {word.removeprefix('error ')}")


_shared: dict[int, MathPool] = {}
_shared_lock = threading.Lock()


def verify(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """`MathPool.verify` with judges that this process shares, started at the first call and ended at exit."""
    with _shared_lock:
        pool = _shared.get(os.getpid())  # a forked child must not speak on its parent's sockets
        if pool is None:
            pool = _shared[os.getpid()] = MathPool()
            atexit.register(pool.close)
    return pool.verify(pairs)
