"""What a sandboxed program may use, and what became of it."""

from __future__ import annotations

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
    """What the called function returned, in plain values; None also when it failed."""


def same_value(said: Any, gold: Any) -> bool:
    """Equal as Python's == has it: a list is no tuple, and floats are compared to the last digit.

    Compared here, in the caller's process; `said` holds plain values only, whatever the program did.
    """
    try:
        return bool(said == gold)
    except RecursionError:
        return False
