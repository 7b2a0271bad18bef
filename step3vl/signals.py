"""Signals are noted, and acted on where the program can stop: nothing is done inside a handler.

A scheduler announces the end of a job with SIGUSR1 or SIGTERM at any instant, also in the middle of a step or of a
collective operation, where saving would store a torn state or wait for ever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any, Self

EXIT_UNFINISHED = 85
"""Exit status of a run that a signal stopped after it had saved: the same command goes on. Linux calls errno 85
"should be restarted"."""

_SHIELDED: set[signal.Signals] = set()
"""Signals that processes forked from now on leave to their parent."""


class SignalNote:
    """Remembers that one of `signals` came, between `install` and `restore`.

    Python runs handlers in the main thread; installed from another thread, nothing is noted.
    """

    def __init__(self, signals: Iterable[signal.Signals]):
        self.signals = tuple(signals)
        self.seen: list[signal.Signals] = []
        """What came, in order."""
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the signals; called again, take them back from whoever took them over since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.signals:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)  # None: set by C code
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen.append(signal.Signals(number))

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def shield_forks(signals: Iterable[signal.Signals]) -> None:
    """From now on, processes forked from this one (workers of a DataLoader) block `signals`; () ends it.

    A scheduler signals every process of a job. A worker that died of it would end the step its parent wants to finish.
    """
    _SHIELDED.clear()
    _SHIELDED.update(signals)


def _block() -> None:
    if _SHIELDED:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)


os.register_at_fork(after_in_child=_block)
