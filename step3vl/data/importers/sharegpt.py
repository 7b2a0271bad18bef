"""ShareGPT JSON and JSONL: `conversations` of `{from, value}` or `messages` of `{role, content}`, system, images."""

from __future__ import annotations

from typing import Any

from step3vl.data.importers.llava import SHARED, make_record, turns_field
from step3vl.data.importers.record import Record
from step3vl.data.importers.turns import read_turns

NAMES = ("conversations", "messages")
FIELDS = (*SHARED, *NAMES)


def read_sharegpt(value: dict[str, Any]) -> Record:
    """A record of ShareGPT data, with text contents. `system` may stand beside the turns. Raises Refused."""
    name = turns_field(value, NAMES, "sharegpt")
    return make_record(value, name, read_turns(value[name], name, parts=False))
