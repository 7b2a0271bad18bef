"""When a generated sequence ends: at a stop token, or at the length limit. Which of the two is kept, never guessed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StopRule:
    """Ends a sequence at any of `stop_ids`, or after `max_new_tokens` tokens.

    Example: StopRule(frozenset({2}), 8).cut([52, 55, 2]) == ([52, 55], False)
    """

    stop_ids: frozenset[int]
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; accepted is 1 or more")
        if not self.stop_ids:
            raise ValueError("stop_ids is empty: a sequence could end by its length alone")

    @classmethod
    def of(cls, stop_ids: Collection[int], max_new_tokens: int) -> StopRule:
        """From any collection of ids."""
        return cls(frozenset(stop_ids), max_new_tokens)

    def stops(self, tokens: Tensor) -> Tensor:
        """Which of the tokens [n] end their sequence: [n] bool."""
        return torch.isin(tokens, torch.tensor(sorted(self.stop_ids), device=tokens.device))

    def cut(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """The ids without their closing stop token, and whether the sequence was truncated (it has none)."""
        if ids and ids[-1] in self.stop_ids:
            return list(ids[:-1]), False
        return list(ids), True
