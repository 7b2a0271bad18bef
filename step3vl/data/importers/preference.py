"""Preferences as on the hub (TRL's layouts): `prompt`, `chosen`, `rejected`, as texts or as turns.

The prompt may also be the turns that both answers begin with, or a `question` beside images (RLAIF-V).
"""

from __future__ import annotations

from typing import Any

from step3vl.data.importers.llava import SHARED, make_record
from step3vl.data.importers.record import Record, Refused, is_empty, shown
from step3vl.data.importers.turns import Turns, as_rows, as_text, read_turns

PROMPTS = ("prompt", "question")
ANSWERS = ("chosen", "rejected")
FIELDS = (*SHARED, *PROMPTS, *ANSWERS, "margin")


def read_preference(value: dict[str, Any]) -> Record:
    """A pair of answers. Raises Refused that names the field, what was found and what is accepted."""
    for name in ANSWERS:
        if is_empty(value.get(name)):
            found = ", ".join(str(name) for name in list(value)[:12]) or "none"
            raise Refused(
                "field missing",
                f"field '{name}' is missing or empty, which a preference needs; the record's fields are {found}",
            )
    prompt = next((name for name in PROMPTS if not is_empty(value.get(name))), None)
    as_turns = [_is_turns(value[name]) for name in ANSWERS]
    if as_turns[0] != as_turns[1]:
        raise Refused("turn of the wrong form", "fields 'chosen' and 'rejected' must both be texts, or both turns")
    read = _from_turns if as_turns[0] else _from_texts
    turns, rejected = read(value, prompt)
    record = make_record(value, prompt or "chosen", turns)
    record.used |= {*ANSWERS, "margin", *(name for name in PROMPTS if name in value)}
    record.rejected, record.margin = rejected, value.get("margin")
    return record


def _is_turns(value: Any) -> bool:
    return not isinstance(value, str) or value.lstrip().startswith("[{")


def _from_texts(value: dict[str, Any], prompt: str | None) -> tuple[Turns, str]:
    if prompt is None:
        raise Refused(
            "field missing",
            "field 'prompt' is missing; where 'chosen' and 'rejected' are texts, nothing says where the question ends",
        )
    chosen, rejected = value["chosen"], value["rejected"]
    if _is_turns(value[prompt]):
        rows = as_rows(value[prompt], prompt)
        turns = read_turns([*rows, {"role": "assistant", "content": chosen}], prompt, parts=True)
    else:
        asked = as_text(value[prompt], f"field '{prompt}'", Turns().notes)
        rows = [{"role": "user", "content": asked}, {"role": "assistant", "content": chosen}]
        turns = read_turns(rows, prompt, parts=False)
    return turns, as_text(rejected, "field 'rejected'", turns.notes)


def _from_turns(value: dict[str, Any], prompt: str | None) -> tuple[Turns, str]:
    chosen, rejected = (as_rows(value[name], name) for name in ANSWERS)
    before: list[Any] = []
    if prompt is not None and len(chosen) == 1:
        given = value[prompt]
        before = as_rows(given, prompt) if _is_turns(given) else [{"role": "user", "content": given}]
    if chosen[:-1] != rejected[:-1]:
        raise Refused(
            "answers to different questions",
            f"fields 'chosen' ({len(chosen)} turns) and 'rejected' ({len(rejected)} turns) differ before their last "
            "turns; accepted are two answers to one conversation",
        )
    turns = read_turns([*before, *chosen], "chosen", parts=True)
    other = read_turns([*before, *rejected], "rejected", parts=True).messages[-1]
    if other.role != "assistant":
        raise Refused("no answer at the end", f"field 'rejected' ends with the turn of {shown(other.role)}")
    return turns, other.content
