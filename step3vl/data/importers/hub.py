"""Rows as on the Hugging Face hub: image columns beside conversations, messages, texts, or question and answer.

Most come from parquet files, but JSON with these fields is read the same way. `--map` gives other columns these names.
"""

from __future__ import annotations

from typing import Any

from step3vl.data.importers.llava import SHARED, make_record
from step3vl.data.importers.record import Record, Refused, is_empty, shown
from step3vl.data.importers.turns import Turns, as_rows, as_text, check_order, read_turns
from step3vl.types import Message

NAMES = ("messages", "conversations")
TURN_FIELDS = (*NAMES, "texts", "question", "answer")
FIELDS = (*SHARED, *TURN_FIELDS)


def read_hub(value: dict[str, Any]) -> Record:
    """A row of a hub data set. The first of messages, conversations, texts, question that is filled is used.

    Raises Refused that names the columns found when there is none.
    """
    for name in NAMES:
        if not is_empty(value.get(name)):
            return make_record(value, name, read_turns(value[name], name, parts=True))
    if not is_empty(value.get("texts")):
        return make_record(value, "texts", _texts(value["texts"]))
    if "question" in value or "answer" in value:
        record = make_record(value, "question", _question(value))
        record.used.add("answer")
        return record
    found = ", ".join(str(name) for name in list(value)[:12]) or "none"
    raise Refused(
        "field missing",
        f"none of messages, conversations, texts, question and answer is filled; the row's columns are {found} (rename "
        "with --map, for example --map question=prompt --map answer=label)",
    )


def _texts(rows: Any) -> Turns:
    """`[{user, assistant}, ...]`: one question and answer each."""
    turns = Turns()
    for k, row in enumerate(as_rows(rows, "texts")):
        if not isinstance(row, dict) or not {"user", "assistant"} <= set(row):
            raise Refused("turn of the wrong form", f"texts[{k}] must have 'user' and 'assistant', found {shown(row)}")
        turns.messages += _pair(row["user"], row["assistant"], f"texts[{k}].user", f"texts[{k}].assistant", turns)
        for name in row:
            if name not in ("user", "assistant") and not is_empty(row[name]):
                turns.notes[f"field not imported: texts[].{name}"] += 1
    check_order(turns.messages, "texts")
    return turns


def _question(value: dict[str, Any]) -> Turns:
    for name, other in (("question", "answer"), ("answer", "question")):
        if value.get(name) is None:
            raise Refused(
                "field missing",
                f"field '{name}' is missing, and '{other}' is there; the row's columns are "
                f"{', '.join(list(value)[:12])} (name the column with --map {name}=COLUMN)",
            )
    turns = Turns()
    turns.messages += _pair(value["question"], value["answer"], "field 'question'", "field 'answer'", turns)
    if not turns.messages[1].content.strip():
        raise Refused("empty answer", "field 'answer' is empty; there is nothing to learn from it")
    return turns


def _pair(user: Any, assistant: Any, user_name: str, assistant_name: str, turns: Turns) -> list[Message]:
    return [
        Message(role="user", content=as_text(user, user_name, turns.notes)),
        Message(role="assistant", content=as_text(assistant, assistant_name, turns.notes)),
    ]
