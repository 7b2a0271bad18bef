"""What the importers share: where a record stands, what was found in it, and why it is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from step3vl.types import Message


class Refused(ValueError):
    """One record cannot be imported. The text gives field, found and accepted; `kind` groups refusals in a report."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record stands: a line of a JSON file, a row of a parquet file, or a key of a shard.

    Lines count from 1, as in editors; rows and row groups from 0, as in pandas and pyarrow. A row is counted over the
    whole file.
    """

    file: str
    line: int | None = None
    row_group: int | None = None
    row: int | None = None
    key: str | None = None

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.file}:{self.line}"
        if self.row is not None:
            return f"{self.file}: row group {self.row_group}, row {self.row}"
        return self.file if self.key is None else f"{self.file}:{self.key}"

    @property
    def tag(self) -> str:
        """Short name within the file, for ids: "line12" or "row7"."""
        return f"line{self.line}" if self.line is not None else f"row{self.row}"

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("file", "line", "row_group", "row", "key")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True, kw_only=True)
class Raw:
    """One record as read, before any format looks at it."""

    place: Place
    value: Any = None
    problem: Refused | None = None
    """Why there is no value."""
    num: int = 1
    """How many records this stands for; more than one for a part of a file that cannot be read."""
    unread: str | None = None
    """Set when the rest of the file could not be read: a clause that says from where."""
    skipped_fields: tuple[str, ...] = ()
    """Fields the record has that were not loaded, because no format uses them."""
    done: float = 0.0
    """Share of the file that has been read."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One record as its format understands it. Images are still what the source gave: a path, bytes or a mapping."""

    messages: list[Message]
    images: list[tuple[str, Any]]
    """(field, value) of each image, in order."""
    id: Any = None
    turns_field: str = "conversations"
    used: set[str] = field(default_factory=set)
    """Fields of the record that were read."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was changed or left out on the way, for the report."""
    rejected: str | None = None
    """The worse answer, where the last message is the better one of two."""
    margin: Any = None
    """Of such a pair, as the source gave it."""


def shown(value: Any, limit: int = 60) -> str:
    """A value for a sentence, on one line, cut to `limit` characters. Nothing, true and false as JSON writes them."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, str):
        text = repr(value if len(value) <= limit else value[: limit - 3] + "...")
    elif isinstance(value, dict):
        names = ", ".join(str(name) for name in list(value)[:8])
        text = f"an object with the fields {names}" if value else "an empty object"
    elif isinstance(value, list):
        text = f"a list of {len(value)}"
    else:
        text = repr(value)
    return text if len(text) <= 2 * limit else text[: 2 * limit - 3] + "..."


def is_empty(value: Any) -> bool:
    """None, "", [] and {} count as a field that is not there; parquet fills columns with them."""
    return value is None or (isinstance(value, str | bytes | list | dict) and len(value) == 0)
