"""LLaVA's JSON: `{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}`.

This file also holds what every format does around its turns: the fields of images, the system prompt, and the record.
"""

from __future__ import annotations

from typing import Any

from step3vl.data.importers.record import Record, Refused, is_empty, shown
from step3vl.data.importers.turns import Turns, as_text, check_order, read_turns
from step3vl.types import Message

IMAGE_FIELDS = ("image", "images")
REFUSED_FIELDS = ("video", "videos", "audio", "audios", "tools", "functions")
SHARED = ("id", *IMAGE_FIELDS, "system", *REFUSED_FIELDS)
FIELDS = (*SHARED, "conversations")


def read_llava(value: dict[str, Any]) -> Record:
    """A record of LLaVA's instruction data. Turns are `{from, value}`; `image` is a path or a list of paths.

    Raises Refused.
    """
    name = turns_field(value, ("conversations",), "llava")
    turns = read_turns(value[name], name, parts=False)
    return make_record(value, name, turns)


def turns_field(value: dict[str, Any], names: tuple[str, ...], format: str) -> str:
    """The first of `names` that is filled. Raises Refused that names the fields found."""
    for name in names:
        if not is_empty(value.get(name)):
            return name
    wanted = " or ".join(f"'{name}'" for name in names)
    found = ", ".join(str(name) for name in list(value)[:12]) or "none"
    raise Refused(
        "field missing",
        f"field {wanted} is missing or empty, which a {format} record needs; the record's fields are {found} (another "
        "--format, or --map, may fit)",
    )


def make_record(value: dict[str, Any], name: str, turns: Turns) -> Record:
    """Join the turns of field `name` with the record's images, system prompt and id."""
    for refused in REFUSED_FIELDS:
        if not is_empty(value.get(refused)):
            _refuse(refused, value[refused])
    record = Record(messages=turns.messages, images=_images(value, turns, name), id=value.get("id"), turns_field=name)
    record.notes += turns.notes
    record.used = {name, *SHARED}
    if not is_empty(value.get("system")):
        system = as_text(value["system"], "field 'system'", record.notes)
        if record.messages[0].role == "system":
            raise Refused("order of turns", f"field 'system' and {name}[0] are both system prompts; accepted is one")
        if system.strip():
            record.messages = [Message(role="system", content=system), *record.messages]
            check_order(record.messages, name)
    return record


def _refuse(name: str, found: Any) -> None:
    if name in ("tools", "functions"):
        if isinstance(found, str) and found.strip() in ("[]", "{}", "null"):
            return
        raise Refused(
            "tool or function turn", f"field '{name}' is {shown(found)}; records with tools cannot be imported"
        )
    raise Refused("video or audio", f"field '{name}' is {shown(found)}; video and audio cannot be imported")


def _images(value: dict[str, Any], turns: Turns, name: str) -> list[tuple[str, Any]]:
    filled = [image_field for image_field in IMAGE_FIELDS if not is_empty(value.get(image_field))]
    if len(filled) > 1:
        raise Refused("image field", "fields 'image' and 'images' are both given; accepted is one of them")
    if not filled:
        return [(name, image) for image in turns.images]
    given = value[filled[0]]
    images = given if isinstance(given, list) else [given]
    if turns.images:
        raise Refused(
            "image field", f"images are given in field '{filled[0]}' and inside '{name}'; accepted is one place"
        )
    if turns.numbers:
        wrong = [n for n in turns.numbers if not 0 <= n < len(images)]
        if wrong or len(turns.numbers) != turns.num_placeholders:
            raise Refused(
                "image marks",
                f"the image parts of '{name}' have the indices {turns.numbers[:8]}, but field '{filled[0]}' has "
                f"{len(images)} images",
            )
        images = [images[n] for n in turns.numbers]
    return [(filled[0] if len(images) == 1 else f"{filled[0]}[{k}]", image) for k, image in enumerate(images)]
