"""The account of an import or a check: what was sound, what was refused and why, what was changed on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from step3vl.data.importers.record import Place, Refused

MAX_NOTES = 200
"""Different notes kept; a source whose records all have fields of their own would fill memory."""


@dataclass(slots=True)
class Report:
    """Counts. `sentence` hears every refusal's whole sentence as it comes, in order."""

    num_sound: int = 0
    num_refused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """kind -> the first sentence of its kind, with its place."""
    places: dict[str, str] = field(default_factory=dict)
    """kind -> where it was first seen."""
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    """A clause for whatever else must be known, such as a file whose rest could not be read."""
    sentence: Callable[[str], None] = lambda text: None
    rejected: RejectedFile | None = None

    @property
    def num_records(self) -> int:
        return self.num_sound + self.num_refused

    def refuse(self, place: Place, problem: Refused, num: int = 1) -> None:
        self.num_refused += num
        self.kinds[problem.kind] += num
        text = printable(" ".join(str(problem).split()))
        where = printable(str(place))
        self.first.setdefault(problem.kind, f"{where}: {text}")
        self.places.setdefault(problem.kind, where)
        if self.rejected is not None:
            self.rejected.write(place, problem.kind, text, num)
        self.sentence(f"{where}: {text}")

    def note(self, notes: Counter[str]) -> None:
        for name, num in notes.items():
            name = printable(name)
            if name in self.notes or len(self.notes) < MAX_NOTES:
                self.notes[name] += num
            else:
                self.notes["fields not imported, of other names"] += num

    def problems_table(self, sentences: bool) -> Table:
        """Kinds of problem with counts, the commonest first; with the first sentence of each, or only its place."""
        table = Table(title="problems", title_justify="left", show_lines=sentences)
        table.add_column("problem", no_wrap=True)
        table.add_column("records", justify="right", no_wrap=True)
        table.add_column("the first of them" if sentences else "first at", overflow="fold")
        for kind, num in sorted(self.kinds.items(), key=lambda item: (-item[1], item[0])):
            table.add_row(kind, f"{num:,}", Text((self.first if sentences else self.places)[kind]))
        return table

    def print_notes(self, console: Console) -> None:
        for name, num in sorted(self.notes.items()):
            console.print(f"{num:>9,}  {name}", markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Text for a terminal: control characters and halves of characters written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RejectedFile:
    """`rejected.jsonl`: a line for each refused record with file, line, kind and reason. Written as refusals come."""

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None

    def write(self, place: Place, kind: str, reason: str, num: int) -> None:
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8", errors="backslashreplace")
        row = {**place.to_json(), "kind": kind, "reason": reason} | ({"num_records": num} if num > 1 else {})
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
