"""Rewards for form: thoughts closed once, a boxed answer, a pattern of one's own. It is worth little, and cheap."""

from __future__ import annotations

import re
from typing import Literal

from step3vl.evaluation.extract import TAIL, boxed, final_text

from .base import Answered, EachAnswer


class ThinkOnce(EachAnswer):
    """1 where the answer is one pair of think tags with something in it, and then something said; else 0.

    Args:
        opened: the prompt itself ends with the opening tag, so that an answer holds the closing one only.
    """

    name = "think_once"

    def __init__(self, opened: bool = False):
        super().__init__()
        self.opened = opened

    def score(self, rollout: Answered) -> float:
        text = "<think>" + rollout.text if self.opened else rollout.text.lstrip()
        if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.startswith("<think>"):
            return 0.0
        thought, _, said = text.removeprefix("<think>").partition("</think>")
        return float(bool(thought.strip()) and bool(said.strip()))


class BoxedOnce(EachAnswer):
    """1 where the final text has a \\boxed{} answer with something in it, and not several; else 0."""

    name = "boxed_once"

    def score(self, rollout: Answered) -> float:
        said = final_text(rollout.text)[-TAIL:]
        inside = boxed(said)
        return float(inside is not None and bool(inside.strip()) and said.count("\\boxed") == 1)


class Pattern(EachAnswer):
    """1 where a regular expression matches, else 0.

    Args:
        pattern: Python's; "." matches line ends too. One that backtracks without end is the author's to avoid, so only
            the last `max_characters` are searched.
        match: search: anywhere. whole: from beginning to end.
        part: final: what is said after the thoughts. all: thoughts too.
        max_characters: of the text that is looked at.
    """

    name = "pattern"

    def __init__(
        self,
        pattern: str,
        match: Literal["search", "whole"] = "search",
        part: Literal["final", "all"] = "final",
        max_characters: int = 10_000,
    ):
        super().__init__()
        if match not in ("search", "whole") or part not in ("final", "all"):
            raise ValueError(f"match is {match!r} and part is {part!r}; accepted are search or whole, and final or all")
        if max_characters < 1:
            raise ValueError(f"max_characters is {max_characters}; accepted is 1 or more")
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
        self.match, self.part, self.max_characters = match, part, max_characters

    def score(self, rollout: Answered) -> float:
        text = (final_text(rollout.text) if self.part == "final" else rollout.text)[-self.max_characters :]
        found = self.pattern.fullmatch(text) if self.match == "whole" else self.pattern.search(text)
        return float(found is not None)
