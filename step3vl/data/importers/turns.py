"""Conversations of every dialect as messages: who speaks, what is said, and where an image stands.

Turns are `{from, value}` or `{role, content}`; a content may also be a list of parts, as chat servers take it. Tool
and function turns are refused: there is no role for them here.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from step3vl.data.importers.record import Refused, is_empty, shown
from step3vl.types import IMAGE_MARK, Message

Role = Literal["system", "user", "assistant"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
TOOL_ROLES = ("function", "observation", "tool", "ipython", "code_interpreter")
"""A role that contains one of these words is a tool's."""
PART_TYPES = ("text", "image", "image_url")
IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")
LOUD = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Fields of a turn that hold a part of what is said; a turn that fills one is refused rather than imported in part."""


@dataclass(slots=True)
class Turns:
    """messages, the images that stand inside their parts, and how many parts only mark the place of an image."""

    messages: list[Message] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Which of the record's images each placeholder part means, where the parts say so."""
    num_placeholders: int = 0
    notes: Counter[str] = field(default_factory=Counter)


def read_turns(rows: Any, name: str, parts: bool) -> Turns:
    """The turns in field `name`. parts: contents may be lists of parts. Raises Refused with one sentence."""
    turns = Turns()
    rows = as_rows(rows, name)
    for k, row in enumerate(rows):
        where = f"{name}[{k}]"
        if not isinstance(row, dict):
            raise Refused("turn of the wrong form", f"{where} must be an object, found {shown(row)}")
        speaker, words = ("from", "value") if "from" in row else ("role", "content")
        role = _role(row, speaker, where)
        for loud in LOUD:
            if not is_empty(row.get(loud)):
                raise _apart(loud, words, where)
        if words not in row:
            raise Refused("turn of the wrong form", f"{where} has no field '{words}'; its fields are {', '.join(row)}")
        turns.messages.append(Message(role=role, content=_content(row[words], f"{where}.{words}", parts, turns)))
        _note_rest(row, (speaker, words), f"{name}[]", turns.notes)
    check_order(turns.messages, name)
    return turns


def as_rows(value: Any, name: str) -> list[Any]:
    """A list of objects. Also from JSON text, and from an object of equally long lists (a sequence in parquet)."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refused(
                "turn of the wrong form", f"field '{name}' is text that is not JSON: {shown(value)}"
            ) from None
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        value = [dict(zip(value, row)) for row in zip(*value.values())] if len(lengths) == 1 else value
    if not isinstance(value, list) or not value:
        raise Refused("turn of the wrong form", f"field '{name}' must be a list of turns, found {shown(value)}")
    return value


def check_order(messages: list[Message], name: str) -> None:
    """A system prompt, if any, comes first; then user and assistant take turns, and the assistant has the last word."""
    expected: Role = "user"
    for k, message in enumerate(messages):
        if message.role == "system" and k == 0:
            continue
        if message.role != expected:
            raise Refused(
                "order of turns",
                f"{name}[{k}] is the {message.role}'s turn where the {expected}'s is expected; accepted are a system "
                "prompt first, if any, and then user and assistant in turn",
            )
        if message.role == "assistant" and not message.content.strip():
            raise Refused("empty answer", f"{name}[{k}] is an empty answer; there is nothing to learn from it")
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant" or len(messages) < 2:
        raise Refused(
            "no answer at the end", f"field '{name}' ends without an answer; the last turn must be the assistant's"
        )


def as_text(value: Any, where: str, notes: Counter[str]) -> str:
    """Text, or a number written as text (which is counted in `notes`)."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        notes["numbers written as text"] += 1
        return str(value)
    raise Refused("content is no text", f"{where} must be text, found {shown(value)}")


def _role(row: dict[str, Any], speaker: str, where: str) -> Role:
    if speaker not in row:
        names = ", ".join(str(name) for name in row) or "none"
        raise Refused("turn of the wrong form", f"{where} has neither 'from' nor 'role'; its fields are {names}")
    given = row[speaker]
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is not None:
        return role
    if isinstance(given, str) and any(word in given.lower() for word in TOOL_ROLES):
        raise Refused(
            "tool or function turn",
            f"{where} is by {shown(given)}; tool and function turns cannot be imported, accepted are "
            f"{', '.join(ROLES)}",
        )
    raise Refused("unknown role", f"{where} has {speaker} {shown(given)}; accepted are {', '.join(ROLES)}")


def _apart(name: str, words: str, where: str) -> Refused:
    if name in ("tool_calls", "function_call"):
        return Refused("tool or function turn", f"{where} has '{name}'; tool and function turns cannot be imported")
    return Refused(
        "thinking apart from the answer",
        f"{where} has its thinking in '{name}'; accepted is <think>...</think> at the start of '{words}'",
    )


def _content(value: Any, where: str, parts: bool, turns: Turns) -> str:
    if not isinstance(value, list):
        return as_text(value, where, turns.notes)
    if not parts:
        raise Refused(
            "content is no text", f"{where} must be text, found a list of parts; --format qwenvl reads such contents"
        )
    return "".join(_part(part, f"{where}[{k}]", where, turns) for k, part in enumerate(value))


def _part(part: Any, where: str, content: str, turns: Turns) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Refused("content is no text", f"{where} must be an object with a 'type', found {shown(part)}")
    filled = {name: value for name, value in part.items() if not is_empty(value)}
    kind = filled.get("type") or next(
        (name for name in ("text", *IMAGE_KEYS, "video", "audio") if name in filled), None
    )
    if kind == "text":
        if "text" not in part:
            raise Refused("content is no text", f"{where} is a part of type 'text' without a field 'text'")
        used: tuple[str, ...] = ("type", "text", "index")
        text = as_text("" if part["text"] is None else part["text"], f"{where}.text", turns.notes)
    elif kind in IMAGE_KEYS:
        used, text = ("type", "index", "text", *IMAGE_KEYS), IMAGE_MARK
        found = next((filled[name] for name in IMAGE_KEYS if name in filled), None)
        if found is None:
            turns.num_placeholders += 1
            if isinstance(filled.get("index"), int):
                turns.numbers.append(filled["index"])
        else:
            turns.images.append(found.get("url", found) if isinstance(found, dict) else found)
    elif isinstance(kind, str) and ("video" in kind or "audio" in kind):
        raise Refused("video or audio", f"{where} is a part of type '{kind}'; video and audio cannot be imported")
    else:
        raise Refused("content is no text", f"{where} has type {shown(kind)}; accepted are {', '.join(PART_TYPES)}")
    _note_rest(part, used, f"{content.partition('[')[0]}[].{content.rpartition('.')[2]}[]", turns.notes)
    return text


def _note_rest(row: dict[str, Any], used: tuple[str, ...], where: str, notes: Counter[str]) -> None:
    for name, value in row.items():
        if name not in used and not is_empty(value):
            notes[f"field not imported: {where}.{name}"] += 1
