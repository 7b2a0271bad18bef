"""Rewards for mathematics: equality as math-verify sees it, in killable processes, or by our small grammar at once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from step3vl.evaluation.math_pool import MathPool
from step3vl.evaluation.scorers import math as equal_expressions

from .base import Answered, EachAnswer


class MathVerify:
    """1 where math-verify finds the answer equal to the gold, else 0. Needs: pip install 'step3vl[rl]'.

    Answers that are not judged in time are counted in `counts["timeouts"]`; they are mostly towers of powers, so that
    the default calls them wrong. Those that end their judge are treated so too, and counted in `counts["crashes"]`.

    Args:
        num_workers: judges at work at once.
        timeout_s: seconds that one answer may take.
        late: zero: an answer that is not judged is wrong; drop: it is None.
    """

    name = "math_verify"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __init__(self, num_workers: int = 2, timeout_s: float = 5.0, late: Literal["zero", "drop"] = "zero"):
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"MathVerify needs num_workers >= 1 and timeout_s > 0, got {num_workers} and {timeout_s}")
        if late not in ("zero", "drop"):
            raise ValueError(f"late is {late!r}; accepted are zero and drop")
        self.num_workers, self.timeout_s, self.late = num_workers, timeout_s, late
        self.counts: Counter[str] = Counter()
        self._pool: MathPool | None = None
        self._lock = threading.Lock()

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        if empty := next((rollout.case for rollout in rollouts if not rollout.case.answer.strip()), None):
            raise ValueError(f"{empty.id}: the gold answer is empty; needed is a mathematical expression")
        asked = [k for k, rollout in enumerate(rollouts) if rollout.completion.error is None]
        verdicts = self._verify([(rollouts[k].text, rollouts[k].case.answer) for k in asked])
        values: list[float | None] = [None] * len(rollouts)
        for k, verdict in zip(asked, verdicts):
            late = 0.0 if self.late == "zero" else None
            values[k] = late if verdict is None else float(verdict)
        return values

    def close(self) -> None:
        """End the judges; the next call starts new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    def _verify(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        if not pairs:
            return []
        with self._lock:
            if self._pool is None:
                self._pool = MathPool(self.num_workers, self.timeout_s)
            pool = self._pool
        verdicts = pool.verify(pairs)
        self.counts["timeouts"], self.counts["crashes"] = pool.num_timeouts, pool.num_crashes
        return verdicts

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pool", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._pool, self._lock = None, threading.Lock()


class Expression(EachAnswer):
    """1 where two short expressions agree (sums, products, powers, roots, functions), else 0; within milliseconds.

    For answers as our corpus writes them, and where math-verify is not installed. It reads no sets and no intervals.
    """

    name = "expression"

    def score(self, rollout: Answered) -> float:
        return equal_expressions(rollout.text, rollout.case)
