"""Between the messages of other harnesses and our prompts, and between our answers and their scorers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from step3vl.data.decode import open_image
from step3vl.evaluation.benchmarks.choice import DIRECTLY
from step3vl.evaluation.benchmarks.hub import is_given, lettered
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
                images.append(image if isinstance(image, Image.Image) else _opened(str(image)))
            else:
                raise ValueError(f"a message holds {part['type']}; accepted are text and images")
        out.append(Message(role=message["role"], content=text))
    return Prompt(messages=out, images=images)


def _opened(name: str) -> Image.Image:
    """A file's image, or that of a "data:image/png;base64,..." text."""
    kind, comma, data = name.partition(";base64,")
    if not (kind.startswith("data:image") and comma):
        return open_image(Path(name), name)
    try:
        return open_image(base64.b64decode(data, validate=True), kind)
    except binascii.Error:
        raise ValueError(f"an image of a message is not base64: {data[:40]!r}") from None


# ------------------------------------------------------------------------------------------------ VLMEvalKit


def readable_there(text: str, kind: str) -> str:
    """An answer in the form that VLMEvalKit's scorers of a kind of dataset read; without the think text.

    MCQ: the letter alone. GUI: `pyautogui.click(x=.., y=..)` in shares of the sides, since numbers above 1 are read as
    pixels there. Y/N, VQA and all else: the final text.
    """
    said = final_text(text)
    if kind.startswith("MCQ"):
        return option_letter(said) or said
    point = coordinates(said, 2) if kind == "GUI" else None
    if point is not None and min(point) >= 0:
        x, y = (value / 1000 if max(point) > 1 else value for value in point)
        return f"pyautogui.click(x={x:.4f}, y={y:.4f})"
    return said


def chat_of(message: Sequence[dict[str, Any]], system: str | None = None) -> list[dict[str, Any]]:
    """VLMEvalKit's parts, {type, value} and for some a role, as chat messages; parts of one role in a row are one."""
    opening = [{"role": "system", "type": "text", "value": f"{system}\n"}] if system else []
    chat: list[dict[str, Any]] = []
    for part in [*opening, *message]:
        role = part.get("role", "user")
        if not chat or chat[-1]["role"] != role:
            chat.append({"role": role, "content": []})
        key = {"text": "text", "image": "url"}.get(part["type"], "value")
        chat[-1]["content"].append({"type": part["type"], key: part["value"]})
    return chat


def choice_text(line: Mapping[str, Any]) -> str:
    """A row of VLMEvalKit's multiple choice datasets, asked as our own suite asks."""
    options = [str(line[letter]) for letter in "ABCDEFGHIJ" if is_given(line.get(letter))]
    hint = f"{line['hint']}\n" if is_given(line.get("hint")) else ""
    return f"{hint}{line['question']}\n" + (f"{lettered(options)}\n{DIRECTLY}" if options else "")
