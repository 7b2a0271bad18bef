"""Data that a run leaves out because training on it went wrong; kept in the run's folder, read at every start."""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "left_out.json"


def read_left_out(run: str | Path) -> list[tuple[int, int]]:
    """(first, end) of micro-batches, counted from the run's beginning. Raises ValueError for a damaged file."""
    file = Path(run) / FILE
    if not file.is_file():
        return []
    try:
        return [(int(first), int(end)) for first, end in json.loads(file.read_text())]
    except (ValueError, TypeError):
        raise ValueError(f"{file} is damaged; it holds pairs of numbers, e.g. [[1200, 1205]]") from None


def leave_out(run: str | Path, first: int, end: int) -> None:
    """Add a pair; written beside and renamed."""
    file = Path(run) / FILE
    part = file.with_name(f".{FILE}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps([*read_left_out(run), (first, end)]))
    os.replace(part, file)
