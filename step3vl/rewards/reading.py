"""Rewards for text that is read or recalled: equal, contained, or similar by edit distance."""

from __future__ import annotations

import re
from dataclasses import replace

from step3vl.evaluation.extract import final_text
from step3vl.evaluation.scorers import contains, exact

from .base import Answered, EachAnswer


class Exact(EachAnswer):
    """1 where the whole answer is the gold, or one of gold["answers"], blind to case, space and a final full stop."""

    name = "exact"

    def score(self, rollout: Answered) -> float:
        return max(exact(rollout.text, replace(rollout.case, answer=gold)) for gold in golds(rollout))


class Contains(EachAnswer):
    """1 where the gold, or one of gold["answers"], stands in the answer as whole words.

    Args:
        max_words: a longer answer earns 0, because a list of all that is possible contains everything.
    """

    name = "contains"

    def __init__(self, max_words: int = 100):
        super().__init__()
        if max_words < 1:
            raise ValueError(f"max_words is {max_words}; accepted is 1 or more")
        self.max_words = max_words

    def score(self, rollout: Answered) -> float:
        said = final_text(rollout.text)
        if len(said.split(maxsplit=self.max_words)) > self.max_words or len(said) > 50 * self.max_words:
            return 0.0
        return max(contains(said, replace(rollout.case, answer=gold)) for gold in golds(rollout))


class EditSimilarity(EachAnswer):
    """1 minus the edit distance as a share of the longer text; runs of space count as one.

    Args:
        max_characters: of a gold that is judged; a longer one is None. An answer of more than four times the gold's
            length, and 100 characters, earns 0 unread.
    """

    name = "edit_similarity"

    def __init__(self, max_characters: int = 5000):
        super().__init__()
        if max_characters < 1:
            raise ValueError(f"max_characters is {max_characters}; accepted is 1 or more")
        self.max_characters = max_characters

    def score(self, rollout: Answered) -> float | None:
        gold_texts = [" ".join(gold.split()) for gold in golds(rollout)]
        if max(map(len, gold_texts)) > self.max_characters:
            self.counts["too_long_golds"] += 1
            return None
        said = re.sub(r"\s+", " ", final_text(rollout.text)).strip()
        return max(similarity(said, gold) if len(said) <= 4 * len(gold) + 100 else 0.0 for gold in gold_texts)


def golds(rollout: Answered) -> list[str]:
    """The accepted answers of a case."""
    return [str(answer) for answer in rollout.case.gold.get("answers", ())] or [rollout.case.answer]


def similarity(a: str, b: str) -> float:
    """1 for equal texts, 0 for texts that have nothing in common. Symmetric."""
    longest = max(len(a), len(b))
    return 1.0 - edit_distance(a, b) / longest if longest else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance, a column of the table at a time in the bits of one number (Myers 1999, Hyyro 2003)."""
    if len(a) > len(b):
        a, b = b, a
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    mask, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = mask, 0, len(a)  # where the column rises by 1 and where it falls by 1
    for letter in b:
        equal = places.get(letter, 0)
        zero = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = down | ~(zero | up) & mask, up & zero
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & mask
        up = (right_down << 1 | ~(zero | right_up)) & mask
        down = right_up & zero
    return distance
