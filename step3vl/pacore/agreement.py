"""Which answers say the same, where no scorer knows what was asked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from step3vl.evaluation.extract import boxed, final_text, option_letter

LONGEST = 60
CHOICE = re.compile(r"(?i)\b(?:answer|option|choice)\b|^\W*[A-J]\W*$")
"""Last lines in which a single letter is an option."""


def claim(text: str) -> str:
    """What an answer comes to: its box, its option, or its last line; blind to case, space and marks around it."""
    said = final_text(text) or text.strip()
    last = said.rpartition("\n")[2]
    letter = option_letter(last) if CHOICE.search(last) else None
    found = boxed(said) or letter or last
    return " ".join(found.casefold().split()).strip(" .*$`'\"")


def agreement(texts: Sequence[str]) -> tuple[str, int]:
    """The commonest claim and how many make it; of equally common ones the first. ("", 0) without texts."""
    counts = Counter(claim(text) for text in texts)
    best, num = counts.most_common(1)[0] if counts else ("", 0)
    return (best if len(best) <= LONGEST else best[: LONGEST - 3] + "..."), num
