"""What a reward is: many answers in, one number each out. None means "cannot be judged", which is not "wrong".

Rewards hold no state that training depends on; what they count (time-outs, outages) is for the log alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from step3vl.evaluation import Case
from step3vl.types import Completion, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answer to one question. `prompt` is what was sent, `case` holds the gold, which no model saw."""

    prompt: Prompt
    completion: Completion
    case: Case

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def num_tokens(self) -> int | None:
        """Length of the answer; None where the generator does not tell it."""
        length = self.completion.num_tokens or len(self.completion.token_ids)
        return length if length or not self.text else None


class Reward(Protocol):
    """Anything that can be called so. Rewards of one batch are asked for together, because judges work in parallel."""

    name: str
    bounds: tuple[float, float]
    """Lowest and highest value; a Rubric refuses values outside."""

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]: ...


class EachAnswer(ABC):
    """A reward that looks at one answer at a time. Subclasses write `score`.

    An answer whose generator failed is None without being looked at.
    """

    name: str = ""
    bounds: tuple[float, float] = (0.0, 1.0)

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """What happened since the start, by name; for the log."""

    @abstractmethod
    def score(self, rollout: Answered) -> float | None:
        """The reward of one answer, within `bounds`; None: cannot be judged."""

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        return [None if rollout.completion.error is not None else self.score(rollout) for rollout in rollouts]


def checked(reward: Reward, rollouts: Sequence[Answered]) -> list[float | None]:
    """The reward's values. Raises ValueError for a wrong number of them, and for one that is not within its bounds."""
    values = reward(rollouts)
    if len(values) != len(rollouts):
        raise ValueError(f"reward {reward.name!r} returned {len(values)} values for {len(rollouts)} answers")
    low, high = reward.bounds
    for value, rollout in zip(values, rollouts):
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{rollout.case.id}: reward {reward.name!r} gave {value}; its range is {low} to {high}")
    return values


def share(key: str, value: float) -> float:
    """`value` if it lies in 0 to 1. Raises ValueError naming the key otherwise."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key} is {value}; accepted is 0 to 1")
    return value


def positive(key: str, value: float) -> float:
    """`value` if it is finite and above 0. Raises ValueError naming the key otherwise."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key} is {value}; accepted is a number above 0")
    return value
