"""Text of an answer that is still being made: token by token, and never half a character.

A byte-level tokenizer may spread one character over several tokens; until the last of them has come, decoding shows
the replacement character, and that is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Pieces of text whose sum is the text of all ids.

    `decode` must be that of a byte-level tokenizer: text of two halves cut between characters is the text of the whole.

    Example: with "é" spread over ids 7 and 8, feed(7) == "" and feed(8) == "é".
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.pending: list[int] = []
        """Ids since text last ended between characters."""
        self.shown = 0
        """Characters of the text of the pending ids that have been given out."""

    def feed(self, id: int) -> str:
        """The text that has become certain with this id; may be empty."""
        self.pending.append(id)
        text = self.decode(self.pending)
        if not text.endswith(UNFINISHED):
            piece, self.pending, self.shown = text[self.shown :], [], 0
            return piece
        certain = len(text) - 1  # a character cut short is one replacement character; those before it are settled
        piece, self.shown = text[self.shown : certain], max(certain, self.shown)
        return piece

    def rest(self) -> str:
        """What was held back, once no id will follow."""
        piece, self.pending, self.shown = self.decode(self.pending)[self.shown :], [], 0
        return piece
