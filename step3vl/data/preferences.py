"""Preferences: two answers to one conversation, of which one is better. What reward models are trained on.

A preference lies in the same shards as any sample; its row has `chosen` and `rejected` in place of a last answer, and
may have a `margin` (docs/data_format.md). Trained on by a stage that knows no preferences, it is its chosen answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from step3vl.data import schema
from step3vl.types import IMAGE_MARK, Message, Sample

FIELDS = ("chosen", "rejected", "margin")
LARGEST_MARGIN = 1e6


@dataclass(slots=True, kw_only=True)
class Preference(Sample):
    """A sample whose last message is the chosen answer, and the rejected one."""

    rejected: str
    margin: float | None = None
    """By how much the scores should differ at least; None: not said."""

    @property
    def chosen(self) -> str:
        return self.messages[-1].content

    def answered(self, text: str) -> list[Message]:
        """The conversation with an answer at its end."""
        return [*self.messages[:-1], Message(role="assistant", content=text)]


def to_json(sample: Sample) -> dict[str, Any]:
    """The row to store, of a sample or of a preference."""
    row = schema.to_json(sample)
    if isinstance(sample, Preference):
        row["messages"] = row["messages"][:-1]
        row |= {"chosen": sample.chosen, "rejected": sample.rejected}
        row |= {} if sample.margin is None else {"margin": sample.margin}
    return row


def from_json(row: Any, images: Sequence[Image.Image], where: str) -> Sample:
    """Check a stored row; one with `chosen` or `rejected` becomes a Preference.

    Raises ValueError with one sentence that names `where`, the field, what was found and what is accepted.
    """
    if not isinstance(row, dict) or not any(name in row for name in FIELDS):
        return schema.from_json(row, images, where)
    for name in ("chosen", "rejected"):
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: field '{name}' must be an answer's text that is not empty, found {text!r:.80}")
        if IMAGE_MARK in text:
            raise ValueError(f"{where}: field '{name}' has an {IMAGE_MARK} mark; images belong to the conversation")
    if row["chosen"] == row["rejected"]:
        raise ValueError(f"{where}: fields 'chosen' and 'rejected' are the same text, which prefers nothing")
    margin = row.get("margin")
    if margin is not None and not _is_margin(margin):
        raise ValueError(f"{where}: field 'margin' must be a number from 0 to {LARGEST_MARGIN:g}, found {margin!r}")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or _role(messages[-1]) != "user":
        last = _role(messages[-1]) if isinstance(messages, list) and messages else None
        raise ValueError(
            f"{where}: field 'messages' of a preference must end with the user's turn, found {last!r}; the answers are "
            "in 'chosen' and 'rejected'"
        )
    plain = {name: value for name, value in row.items() if name not in FIELDS}
    plain["messages"] = [*messages, {"role": "assistant", "content": row["chosen"]}]
    sample = schema.from_json(plain, images, where)
    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    return Preference(**values, rejected=row["rejected"], margin=None if margin is None else float(margin))


def _is_margin(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 <= value <= LARGEST_MARGIN


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None
