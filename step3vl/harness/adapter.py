"""Between lmms-eval's chat messages and our prompts, and between our answers and its scorers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from step3vl.data.decode import open_image
from step3vl.evaluation.extract import coordinates, final_text, option_letter
from step3vl.types import IMAGE_MARK, Message, Prompt

POINT_TASKS = ("screenspot", "osworld_g")
"""Tasks whose scorers divide numbers above 1 by pixels, while ours are on a grid of 0 to 1000."""
LETTER_TASKS = ("mmstar", "mmbench", "ai2d", "blink", "mmvp", "vstar", "mmmu", "ccbench", "phyx_mc", "phyx_mini_mc")
"""Tasks whose parsers miss letters in bold or in boxes, or take one from the prose around them."""


def readable(text: str, task: str) -> str:
    """An answer in the form that the task's scorer reads; without the think text."""
    said = final_text(text)
    if task.startswith(POINT_TASKS):
        point = coordinates(said, 2)
        if point is not None and max(point) > 1:
            return f"[{point[0] / 1000:.4f}, {point[1] / 1000:.4f}]"
        return said
    if task.startswith(LETTER_TASKS):
        return option_letter(said) or said
    return said


def prompt_of(messages: Sequence[dict[str, Any]]) -> Prompt:
    """Chat messages with text and images in reading order as a prompt of ours."""
    out: list[Message] = []
    images: list[Image.Image] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            if part["type"] == "text":
                text += part["text"].replace(IMAGE_MARK, "")
            elif part["type"] == "image":
                text += IMAGE_MARK
                image = part["url"]
                images.append(image if isinstance(image, Image.Image) else open_image(Path(image), str(image)))
            else:
                raise ValueError(f"a message holds {part['type']}; accepted are text and images")
        out.append(Message(role=message["role"], content=text))
    return Prompt(messages=out, images=images)
