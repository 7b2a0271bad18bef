"""Penalty for saying the same again and again, over token ids, so that no language is favoured."""

from __future__ import annotations

from .base import Answered, EachAnswer


class Repetition(EachAnswer):
    """-(1 - distinct n-grams / n-grams), -1 to 0. Weight it by the largest penalty that is wanted.

    Args:
        n: tokens of an n-gram. An answer of fewer tokens repeats nothing; one whose tokens are not told is None.
    """

    name = "repetition"
    bounds: tuple[float, float] = (-1.0, 0.0)

    def __init__(self, n: int = 3):
        super().__init__()
        if n < 1:
            raise ValueError(f"n is {n}; accepted is 1 or more")
        self.n = n

    def score(self, rollout: Answered) -> float | None:
        ids = rollout.completion.token_ids
        if not ids and rollout.num_tokens != 0:
            return None
        num_grams = len(ids) - self.n + 1
        if num_grams < 1:
            return 0.0
        return len(set(zip(*(ids[k:] for k in range(self.n))))) / num_grams - 1.0
