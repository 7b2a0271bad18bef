"""When a generated sequence ends: at a stop token, a stop text, or the length limit. Which it was is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step3vl.generation.streaming import TextStream


@dataclass(frozen=True, slots=True)
class StopRule:
    """Ends a sequence at any of `stop_ids`, at any of the texts `stop`, or after `max_new_tokens` tokens.

    Example: StopRule(frozenset({2}), 8).cut([52, 55, 2]) == ([52, 55], False)
    """

    stop_ids: frozenset[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; accepted is 1 or more")
        if not self.stop_ids:
            raise ValueError("stop_ids is empty: a sequence could end by its length alone")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; accepted is a tuple of texts, none of them empty")

    @classmethod
    def of(cls, stop_ids: Collection[int], max_new_tokens: int, stop: tuple[str, ...] = ()) -> StopRule:
        """From any collection of ids."""
        return cls(frozenset(stop_ids), max_new_tokens, stop)

    def stops(self, tokens: Tensor) -> Tensor:
        """Which of the tokens [n] end their sequence: [n] bool."""
        return torch.isin(tokens, torch.tensor(sorted(self.stop_ids), device=tokens.device))

    def cut(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """The ids without their closing stop token, and whether the sequence was truncated (it has none)."""
        if ids and ids[-1] in self.stop_ids:
            return list(ids[:-1]), False
        return list(ids), True


class StopTexts:
    """Watches a text as it grows, and lets through what can no longer be part of a stop text.

    Args:
        decode: as for `TextStream`.
        stop: the stop texts; with none of them all text is let through as soon as it is certain.
        begun: ids before the first that is fed: a stop text may begin in theirs, but it is never let through.

    Example: with the stop text "ab" and one letter an id, "xa" lets "x" through, "c" then "ac", and "ab" nothing.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...], begun: Sequence[int] = ()):
        self.stop = stop
        self.found = False
        """Whether a stop text has come: nothing is let through from there on."""
        self._text = TextStream(decode)
        self._longest = max(map(len, stop), default=0)
        before = ""
        for id in begun if stop else ():
            before = (before + self._text.feed(id))[-self._longest :]
        self._held = before[self._doubt(before) :]
        """Text in which a stop text may have begun."""
        self._num_begun = len(self._held)
        """Characters of it that are of the begun ids."""

    def feed(self, id: int) -> str:
        """The text that has become certain with this id; may be empty."""
        return self._take(self._text.feed(id))

    def rest(self) -> str:
        """What was held back, once no id will follow."""
        piece = self._take(self._text.rest())
        piece, self._held = piece + self._held[self._num_begun :], ""
        return piece

    def _take(self, piece: str) -> str:
        if self.found or not piece:
            return ""
        text = self._held + piece
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        self.found = bool(places)
        end = min(places) if places else self._doubt(text)
        certain = text[self._num_begun : end]
        self._num_begun = max(0, self._num_begun - end)
        self._held = "" if self.found else text[end:]
        return certain

    def _doubt(self, text: str) -> int:
        """Where the longest end of the text begins that is the beginning of a stop text."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stop):
                return start
        return len(text)
