"""Reward for a number: counting, measuring, reading an instrument."""

from __future__ import annotations

import math

from step3vl.evaluation.extract import last_number

from .base import Answered, EachAnswer


class Number(EachAnswer):
    """1 where the number that is said is within the tolerance of the gold, else 0.

    Args:
        relative: tolerance as a share of the gold's size.
        absolute: tolerance in the answer's own unit; the larger of the two counts.
    """

    name = "number"

    def __init__(self, relative: float = 1e-6, absolute: float = 1e-6):
        super().__init__()
        for key, value in (("relative", relative), ("absolute", absolute)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{key} is {value}; accepted is 0 or more")
        self.relative, self.absolute = relative, absolute

    def score(self, rollout: Answered) -> float:
        gold, said = last_number(rollout.case.answer), last_number(rollout.text)
        if gold is None:
            raise ValueError(f"{rollout.case.id}: gold answer {rollout.case.answer!r} holds no number")
        return float(said is not None and abs(said - gold) <= max(self.absolute, self.relative * abs(gold)))
