"""What a free-form answer says: its final text, option letter, number, point or box. None means: nothing found."""

from __future__ import annotations

import re

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"


def final_text(text: str) -> str:
    """Everything after the last closing think tag, trimmed."""
    return text.rsplit("</think>", 1)[-1].strip()


def option_letter(text: str) -> str | None:
    """'B', '(B)', 'B.', 'Answer: B' -> 'B'; the last stand-alone letter wins; 'A' and 'I' in prose do not."""
    text = final_text(text)
    if match := re.fullmatch(r"\W*([A-Ja-j])\W*", text):
        return match[1].upper()
    marked = re.findall(
        r"(?:answer|option|choice)\s*(?:is|:)?\s*\(?\**([A-J])\b|\(([A-J])\)|\b([A-HJ])[.)](?=\s|$)", text
    )
    letters = [a or b or c for a, b, c in marked] or re.findall(r"(?<![A-Za-z'])([B-HJ])(?![A-Za-z'])", text)
    return letters[-1] if letters else None


def last_number(text: str) -> float | None:
    """The last number in the text; '1,200', '3/4' and '-0.5' are numbers."""
    found = re.findall(NUMBER, final_text(text))
    if not found:
        return None
    top, _, bottom = found[-1].replace(",", "").partition("/")
    return None if bottom and float(bottom) == 0 else float(top) / (float(bottom) if bottom else 1.0)


def coordinates(text: str, count: int) -> tuple[float, ...] | None:
    """The last group of exactly `count` numbers in brackets, else the only `count` numbers there are."""
    text = final_text(text)
    groups = [re.findall(NUMBER, group) for group in re.findall(r"[(\[<]([^()\[\]<>]*)[)\]>]", text)]
    groups = [group for group in groups if len(group) == count] or [re.findall(NUMBER, text)]
    if len(groups[-1]) != count:
        return None
    try:
        return tuple(float(value.replace(",", "")) for value in groups[-1])
    except ValueError:
        return None
