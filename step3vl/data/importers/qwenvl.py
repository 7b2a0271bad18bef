"""Qwen2.5-VL's and Qwen3-VL's fine-tuning JSON: <image> tags with `image`, or messages whose contents are parts.

Boxes and points that stand in the text stay text, as they are: Qwen2.5-VL writes pixels of a resized image, Qwen3-VL
thousandths, and nothing in a record says which.
"""

from __future__ import annotations

import re
from typing import Any

from step3vl.data.importers.llava import SHARED, make_record, turns_field
from step3vl.data.importers.record import Record, Refused, shown
from step3vl.data.importers.turns import read_turns

NAMES = ("conversations", "messages")
FIELDS = (*SHARED, *NAMES)

_TAG = re.compile(r"<img>[^<>]{1,4096}</img>|<\|(?:image_pad|video_pad|vision_start)\|>")


def read_qwenvl(value: dict[str, Any]) -> Record:
    """A record of Qwen-VL's fine-tuning data. Raises Refused, also for the first Qwen-VL's <img>path</img>."""
    name = turns_field(value, NAMES, "qwenvl")
    turns = read_turns(value[name], name, parts=True)
    for k, message in enumerate(turns.messages):
        tag = _TAG.search(message.content)
        if tag:
            raise Refused(
                "image marks",
                f"{name}[{k}] marks an image with {shown(tag[0])}; accepted is <image>, with the path in field 'image'",
            )
    return make_record(value, name, turns)
