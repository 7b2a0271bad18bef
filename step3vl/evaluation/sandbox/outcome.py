"""What a sandboxed program may use, and what became of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

Status = Literal["ok", "timeout", "memory", "output", "crash", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Ceilings of one program. A program that reaches one is stopped; it cannot raise them."""

    cpu_s: float = 10
    """CPU seconds of each process, rounded up to whole ones."""
    wall_s: float = 12
    """Seconds from the program's start; the parent keeps this clock."""
    memory_mb: int = 512
    """Address space of each process, and resident memory of all of them together."""
    output_kb: int = 256
    """Bytes kept of stdout, of stderr and of a returned value, each; a program that writes more is stopped."""
    num_processes: int = 32
    """Processes and threads alive at once."""
    file_mb: int = 16
    """Size of one file, and of all files in the program's folder together."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Limits.{f.name}={value}: must be a finite number above 0")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one program did. Only `status == "ok"` means that it ended by itself, with exit status 0.

    Example: Outcome(stdout="471\\n", stderr="", status="ok", seconds=0.02)
    """

    stdout: str
    stderr: str
    """The program's own words, or a sentence that says why it was stopped or refused."""
    status: Status
    seconds: float
    value: Any = None
    """What the called function returned, as JSON carries it (tuples are lists); None also when it failed."""


def same_value(said: Any, gold: Any, tolerance: float = 1e-9) -> bool:
    """Equal as Python's == would have it after JSON: tuples are lists, sets lists in any order, keys strings.

    Compared here, in the caller's process. `tolerance` is relative and absolute, and applies to floats only.
    """
    pairs = [(said, gold)]
    while pairs:
        a, b = pairs.pop()
        if isinstance(b, set | frozenset):
            a, b = (sorted(v, key=repr) if isinstance(v, list | set | frozenset) else v for v in (a, b))
        if isinstance(b, list | tuple):
            if not isinstance(a, list | tuple) or len(a) != len(b):
                return False
            pairs += zip(a, b)
        elif isinstance(b, dict):
            if not isinstance(a, dict):
                return False
            left, right = ({_key(k): v for k, v in d.items()} for d in (a, b))
            if set(left) != set(right):
                return False
            pairs += [(left[k], right[k]) for k in right]
        elif not (_close(a, b, tolerance) if isinstance(a, float) or isinstance(b, float) else a == b):
            return False
    return True


def _key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key, default=str)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return False
    try:
        return a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer beyond any float
        return False
