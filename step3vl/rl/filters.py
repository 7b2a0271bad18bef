"""Which groups of rollouts are trained on. What is left out is counted by name and logged as a share of all groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .rollout import Rollout


class Filter(Protocol):
    """A rule for groups. `name` is that of the log."""

    name: str

    def drops(self, group: Sequence[Rollout]) -> bool: ...


@dataclass(frozen=True)
class SameReward:
    """Drops groups whose judged responses all earned the same: all right or all wrong, they compare nothing (DAPO)."""

    name: str = "same_reward"
    tolerance: float = 1e-6

    def drops(self, group: Sequence[Rollout]) -> bool:
        found = totals(group)
        return not found or max(found) - min(found) <= self.tolerance


@dataclass(frozen=True)
class TooEasy:
    """Drops groups whose mean reward is above `above`."""

    above: float
    name: str = "too_easy"

    def drops(self, group: Sequence[Rollout]) -> bool:
        found = totals(group)
        return bool(found) and sum(found) / len(found) > self.above


@dataclass(frozen=True)
class TooLong:
    """Drops groups of which more than a share of responses ran into the length limit."""

    most: float = 0.5
    name: str = "too_long"

    def drops(self, group: Sequence[Rollout]) -> bool:
        return sum(rollout.completion.truncated for rollout in group) > self.most * len(group)


def totals(group: Sequence[Rollout]) -> list[float]:
    """Rewards of the responses that could be judged."""
    return [rollout.score.total for rollout in group if rollout.score.total is not None]


def kept(groups: Sequence[Sequence[Rollout]], filters: Sequence[Filter]) -> tuple[list[Rollout], Counter[str]]:
    """The judged rollouts of groups that no filter drops, and how many groups each filter, the first to do so, drops.

    Groups in which nothing could be judged are dropped as "unjudged".
    """
    rollouts: list[Rollout] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        if not totals(group):
            dropped["unjudged"] += 1
            continue
        name = next((rule.name for rule in filters if rule.drops(group)), None)
        if name is None:
            rollouts += [rollout for rollout in group if rollout.score.total is not None]
        else:
            dropped[name] += 1
    return rollouts, dropped
