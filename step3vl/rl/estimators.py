"""The ways to turn scored responses into advantages of tokens, each a part that an experiment file can name.

All take the same `Scored` batch and give the same `Advantages`; the arithmetic is that of `step3vl.rl.advantage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .advantage import (
    Reduce,
    Scale,
    discounted_sums,
    gae,
    gdpo,
    group_relative,
    is_last,
    leave_one_out,
    moments,
    weighted_reward,
    whiten,
)


@dataclass(kw_only=True)
class Scored:
    """S responses with K rewards each, and their N tokens, side by side and in order."""

    rewards: Tensor  # [S,K]; NaN: cannot be judged
    weights: Sequence[float] | None = None  # K factors; None: 1 each
    group: Tensor  # [S] long, the prompt of each response, 0 to G - 1; a group is whole
    num_groups: int  # G
    sequence: Tensor  # [N] long, the response of each token, never falling
    values: Tensor | None = None  # [N], of the critic when the iteration began
    token_rewards: Tensor | None = None  # [N], added at each token: minus coefficient x k1, for instance

    @property
    def total(self) -> Tensor:
        """[S]: weighted sum of rewards; NaN where none could be judged."""
        return weighted_reward(self.rewards, self.weights)

    def without_token_rewards(self, method: str) -> Scored:
        """Itself. ValueError if there are token rewards, which `method` would not see."""
        if self.token_rewards is not None:
            raise ValueError(f"{method} judges whole responses and would ignore token_rewards; put them into rewards")
        return self


class Advantages(NamedTuple):
    """advantages [N]; returns [N], what a critic learns, NaN where it learns nothing; None without a critic."""

    advantages: Tensor
    returns: Tensor | None = None


class Estimator(Protocol):
    """`reduce` adds a tensor over ranks; None: there is one."""

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages: ...


@dataclass(frozen=True, kw_only=True)
class GAE:
    """Generalised advantage estimation with a critic (PPO); whitened over all tokens of all ranks.

    Args:
        gamma, lam: discount, and weight of longer sums of rewards.
        whiten: to mean 0 and variance 1.
    """

    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise ValueError(f"gamma and lam must be in 0..1, got {self.gamma} and {self.lam}")

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages:
        if scored.values is None:
            raise ValueError("GAE needs values, so a critic; GroupRelative does without")
        total = scored.total
        advantages, returns = gae(
            scored.values, total, scored.sequence, self.gamma, self.lam, token_rewards=scored.token_rewards
        )
        if self.whiten:
            advantages = _whiten(advantages, ~total.isnan()[scored.sequence], reduce)
        return Advantages(advantages, returns)


@dataclass(frozen=True, kw_only=True)
class GroupRelative:
    """Rewards relative to those of the same prompt (GRPO). Arguments as in `group_relative`."""

    scale: Scale = "group"
    unbiased: bool = True
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if self.scale not in ("group", "batch", "none"):
            raise ValueError(f"scale is {self.scale!r}; accepted are group, batch, none")

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages:
        scored.without_token_rewards("GroupRelative")
        advantages = group_relative(
            scored.total, scored.group, scored.num_groups, self.scale, self.unbiased, self.epsilon, reduce
        )
        return Advantages(advantages[scored.sequence])


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """Rewards minus the mean of the prompt's other responses (RLOO)."""

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages:
        scored.without_token_rewards("LeaveOneOut")
        return Advantages(leave_one_out(scored.total, scored.group, scored.num_groups)[scored.sequence])


@dataclass(frozen=True, kw_only=True)
class GDPO:
    """Several rewards, each normalised within its group before they are added (GDPO)."""

    epsilon: float = 1e-4

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages:
        scored.without_token_rewards("GDPO")
        advantages = gdpo(scored.rewards, scored.group, scored.num_groups, scored.weights, self.epsilon, reduce)
        return Advantages(advantages[scored.sequence])


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """Discounted sum of what follows a token, whitened over all tokens; no critic and no groups (REINFORCE++)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in 0..1, got {self.gamma}")

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages:
        total = scored.total
        judged = ~total.isnan()[scored.sequence]  # [N]
        rewards = total[scored.sequence].where(is_last(scored.sequence), 0.0)
        if scored.token_rewards is not None:
            rewards = rewards + scored.token_rewards
        sums = discounted_sums(rewards.where(judged, 0.0), scored.sequence, self.gamma)
        return Advantages(_whiten(sums, judged, reduce).to(total.dtype))


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlusBaseline:
    """Rewards minus the mean of the prompt's responses, whitened over all tokens (REINFORCE++-baseline)."""

    def __call__(self, scored: Scored, reduce: Reduce | None = None) -> Advantages:
        scored.without_token_rewards("ReinforcePlusPlusBaseline")
        total = scored.total
        centred = group_relative(total, scored.group, scored.num_groups, scale="none")
        judged = ~total.isnan()
        return Advantages(_whiten(centred[scored.sequence], judged[scored.sequence], reduce))


def _whiten(x: Tensor, judged: Tensor, reduce: Reduce | None) -> Tensor:
    sums = moments(x, judged)
    return whiten(x, sums if reduce is None else reduce(sums), judged)
