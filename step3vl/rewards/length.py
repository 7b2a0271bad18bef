"""Penalty for answers that come near the length limit, before they are cut off (DAPO's soft overlong punishment)."""

from __future__ import annotations

from .base import Answered, EachAnswer


class SoftOverlong(EachAnswer):
    """0 up to `max_tokens - margin_tokens`, then a straight line down to -1 at `max_tokens`, and -1 beyond.

    Args:
        max_tokens: the limit of generation.
        margin_tokens: length of the slope.
    """

    name = "soft_overlong"
    bounds: tuple[float, float] = (-1.0, 0.0)

    def __init__(self, max_tokens: int, margin_tokens: int):
        super().__init__()
        if not 0 < margin_tokens <= max_tokens:
            raise ValueError(f"margin_tokens is {margin_tokens}; accepted is 1 to max_tokens ({max_tokens})")
        self.max_tokens, self.margin_tokens = max_tokens, margin_tokens

    def score(self, rollout: Answered) -> float | None:
        length = rollout.num_tokens
        if length is None:
            return None
        over = length - (self.max_tokens - self.margin_tokens)
        return -min(max(over / self.margin_tokens, 0.0), 1.0)
