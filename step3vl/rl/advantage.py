"""Advantages as functions of tensors: GAE over packed tokens, group baselines over rewards, whitening from sums.

A reward of NaN means that the response cannot be judged: it is left out of every baseline, and its advantage is 0.
All is computed in fp64 and returned in fp32 (fp64 if the input is). Letters: S responses, N their tokens, K rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor over ranks, for instance by an all-reduce."""
Scale = Literal["group", "batch", "none"]


# ------------------------------------------------------------------------------------------------ tokens


def discounted_sums(x: Tensor, sequence: Tensor, factor: float = 1.0) -> Tensor:
    """[N] fp64: y_t = x_t + factor y_(t+1) within each response; log2(longest response) passes, no loop over tokens.

    Args:
        x: [N], tokens of a response side by side and in order.
        sequence: [N] long, the response of each token, never falling.
        factor: 0 to 1.
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"a discount must be in 0..1, got {factor}")
    if x.shape != sequence.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, but sequence {tuple(sequence.shape)}")
    if bool((sequence.diff() < 0).any()):
        raise ValueError("sequence must not fall: the tokens of a response belong side by side, responses in order")
    sums = x.double()
    longest = int(torch.unique_consecutive(sequence, return_counts=True)[1].max()) if len(x) else 0
    step = 1
    while step < longest and factor**step > 0:  # after each pass sums reach twice as far
        is_inside = sequence[:-step] == sequence[step:]
        sums = torch.cat([sums[:-step] + (factor**step * sums[step:]).where(is_inside, 0.0), sums[-step:]])
        step *= 2
    return sums


def is_last(sequence: Tensor) -> Tensor:
    """[N] bool: True at the last token of each response."""
    return torch.cat([sequence[:-1] != sequence[1:], torch.ones_like(sequence[:1], dtype=torch.bool)])


def gae(
    values: Tensor,
    rewards: Tensor,
    sequence: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    token_rewards: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) with a reward at the end of each response.

    With gamma = lam = 1 and no token rewards, the return is the reward at every token, the advantage reward - value.

    Args:
        values: [N], of the critic when the iteration began; tokens of a response side by side and in order.
        rewards: [S], NaN: cannot be judged.
        sequence: [N] long, the response of each token.
        gamma, lam: discount, and weight of longer sums of rewards.
        token_rewards: [N], added at each token: a penalty, for instance.
        bootstrap: [S], value after the last token of a response that was cut short; None: 0.

    Returns:
        advantages [N] and returns [N], advantages + values. Responses that cannot be judged: 0 and NaN.
    """
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma and lam must be in 0..1, got {gamma} and {lam}")
    exact = _exact(values)
    judged = ~rewards.isnan()[sequence]  # [N]
    if not bool(values[judged].isfinite().all()):
        raise ValueError("values of the critic are not finite, so there are no advantages")
    now = values.detach().double().where(judged, 0.0)  # [N]
    last = is_last(sequence)
    after = now.new_zeros(len(rewards)) if bootstrap is None else bootstrap.detach().double()  # [S]
    following = torch.where(last, after[sequence], now.roll(-1))  # [N]
    deltas = gamma * following - now + rewards.double()[sequence].where(last, 0.0)
    if token_rewards is not None:
        deltas = deltas + token_rewards.double()
    advantages = discounted_sums(deltas.where(judged, 0.0), sequence, gamma * lam)
    returns = (advantages + now).where(judged, float("nan"))
    return advantages.to(exact), returns.to(exact)


# ------------------------------------------------------------------------------------------------ sums over the batch


def moments(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """[3] fp64: count, sum and sum of squares of x where `keep`, NaN left out; to be added over ranks for `whiten`."""
    keep = ~x.isnan() if keep is None else keep & ~x.isnan()
    x = x[keep].double()
    return torch.stack([x.new_tensor(float(len(x))), x.sum(), x.square().sum()])


def _mean_and_variance(sums: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    count, total, squares = sums.unbind()
    mean = total / count.clamp_min(1)
    variance = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
    return mean, variance * count / (count - 1).clamp_min(1) if unbiased else variance


def whiten(
    x: Tensor,
    sums: Tensor,
    keep: Tensor | None = None,
    shift: bool = True,
    unbiased: bool = False,
    min_variance: float = 1e-8,
) -> Tensor:
    """x to mean 0 (if `shift`) and variance 1, by the `moments` of the whole batch; 0 where not `keep` or x is NaN."""
    keep = ~x.isnan() if keep is None else keep & ~x.isnan()
    mean, variance = _mean_and_variance(sums, unbiased)
    centred = x.double() - mean if shift else x.double()
    return (centred * variance.clamp_min(min_variance).rsqrt()).where(keep, 0.0).to(_exact(x))


# ------------------------------------------------------------------------------------------------ groups


def weighted_reward(
    rewards: Tensor | Sequence[Sequence[float | None]], weights: Sequence[float] | None = None
) -> Tensor:
    """[S]: weighted sum of the rewards [S,K] that could be judged; NaN where none could. None counts as NaN."""
    if not isinstance(rewards, Tensor):
        rows = [[float("nan") if reward is None else reward for reward in row] for row in rewards]
        rewards = torch.tensor(rows, dtype=torch.float32)
    factors = _weights(rewards, weights)
    return (rewards.double() * factors).nansum(-1).where(~rewards.isnan().all(-1), float("nan")).to(_exact(rewards))


def group_relative(
    rewards: Tensor,
    group: Tensor,
    num_groups: int,
    scale: Scale = "group",
    unbiased: bool = True,
    epsilon: float = 1e-4,
    reduce: Reduce | None = None,
) -> Tensor:
    """(R - mean of the group) / (standard deviation + epsilon), 0 for a group with one judged response (GRPO).

    Args:
        rewards: [S], NaN: cannot be judged.
        group: [S] long, the prompt of each response, 0 to G - 1; a group must be whole.
        num_groups: G.
        scale: whose standard deviation: the group's, the batch's, or none (Dr.GRPO).
        unbiased: divide the sum of squares by n - 1 in place of n.
        epsilon: keeps the division finite.
        reduce: adds sums over ranks, for scale: batch; None: these rewards are all.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}; accepted are group, batch, none")
    judged, centred, counts = _centred(rewards, group, num_groups)
    if scale == "group":
        squares = _group_sums(centred.square(), group, num_groups)
        std = (squares / (counts - int(unbiased)).clamp_min(1)).sqrt()[group]
        centred = centred / (std + epsilon)
    elif scale == "batch":
        sums = moments(rewards)
        _, variance = _mean_and_variance(sums if reduce is None else reduce(sums), unbiased)
        centred = centred / (variance.sqrt() + epsilon)
    return centred.where(judged, 0.0).to(_exact(rewards))


def leave_one_out(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """R - mean of the group's other judged responses = n / (n - 1) (R - mean of all); 0 where there is no other (RLOO).

    Arguments as in `group_relative`.
    """
    judged, centred, counts = _centred(rewards, group, num_groups)
    factors = counts / (counts - 1).clamp_min(1)
    return (centred * factors[group]).where(judged, 0.0).to(_exact(rewards))


def gdpo(
    rewards: Tensor,
    group: Tensor,
    num_groups: int,
    weights: Sequence[float] | None = None,
    epsilon: float = 1e-4,
    reduce: Reduce | None = None,
) -> Tensor:
    """[S]: each reward normalised within its group, their weighted sum normalised over the batch (GDPO).

    So a reward that varies little is not drowned by one that varies much. A response is left out only if none of its
    rewards could be judged.

    Args:
        rewards: [S,K], NaN: cannot be judged.
        group, num_groups, epsilon, reduce: as in `group_relative`.
        weights: K factors; None: 1 each.
    """
    factors = _weights(rewards, weights)
    columns = [group_relative(column.double(), group, num_groups, epsilon=epsilon) for column in rewards.unbind(-1)]
    judged = ~rewards.isnan().all(-1)  # [S]
    total = (torch.stack(columns, -1) * factors).sum(-1)  # [S]
    sums = moments(total, judged)
    mean, variance = _mean_and_variance(sums if reduce is None else reduce(sums), unbiased=True)
    return ((total - mean) / (variance.sqrt() + epsilon)).where(judged, 0.0).to(_exact(rewards))


def _centred(rewards: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """judged [S] bool, rewards - mean of their group [S] fp64 (0 if not judged), judged responses a group [G]."""
    if rewards.shape != group.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and group {tuple(group.shape)} must both have one axis, [S]")
    if bool(rewards.isinf().any()):
        raise ValueError("a reward is infinite; rewards are finite, or NaN where a response cannot be judged")
    judged = ~rewards.isnan()
    lowest = torch.full((num_groups,), float("inf"), dtype=torch.float64, device=rewards.device)  # [G]
    lowest = lowest.scatter_reduce(0, group, rewards.double().where(judged, float("inf")), "amin")
    above = (rewards.double() - lowest[group]).where(judged, 0.0)  # from the lowest: equal rewards give 0 exactly
    counts = _group_sums(judged.double(), group, num_groups)
    means = _group_sums(above, group, num_groups) / counts.clamp_min(1)
    return judged, (above - means[group]).where(judged, 0.0), counts


def _group_sums(x: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return x.new_zeros(num_groups).index_add(0, group, x)


def _weights(rewards: Tensor, weights: Sequence[float] | None) -> Tensor:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [S,K], one column a reward, got {tuple(rewards.shape)}")
    if weights is not None and len(weights) != rewards.shape[1]:
        raise ValueError(f"{len(weights)} weights for {rewards.shape[1]} rewards")
    return torch.tensor(weights or [1.0] * rewards.shape[1], dtype=torch.float64, device=rewards.device)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
