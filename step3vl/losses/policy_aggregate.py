"""How losses of tokens become one loss: the four averages of reinforcement learning over ragged responses.

Each returns a sum and its weight, so the loss is the same however responses are spread over micro-batches and ranks,
as long as a response stays whole. The average decides how much a long answer counts (DAPO section 3.3, Dr.GRPO).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from step3vl.types import WeightedSum

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


class Totals(NamedTuple):
    """What an optimizer step averages over, counted over all its micro-batches and ranks."""

    num_tokens: Tensor | float
    num_sequences: Tensor | float
    """Responses with at least one token."""


def check_aggregation(aggregation: str, max_length: int | None) -> None:
    """ValueError unless `aggregation` is known and has the length that it needs."""
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation is {aggregation!r}; accepted are {', '.join(get_args(Aggregation))}")
    if (aggregation == "seq-mean-token-sum-norm") != (max_length is not None):
        raise ValueError(f"seq-mean-token-sum-norm, and it only, has a max_length; got {max_length} with {aggregation}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}")


def sequence_sums(x: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """[S]: the sum of x [N] over the tokens of each response."""
    return x.new_zeros(num_sequences).index_add(0, sequence, x)


def sequence_means(x: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """[S]: the mean of x [N] over the tokens of each response; 0 for one without tokens."""
    lengths = sequence_sums(torch.ones_like(x), sequence, num_sequences)
    return sequence_sums(x, sequence, num_sequences) / lengths.clamp_min(1)


def aggregate(
    losses: Tensor,
    sequence: Tensor,
    num_sequences: int,
    aggregation: Aggregation,
    totals: Totals | None = None,
    max_length: int | None = None,
) -> WeightedSum:
    """Sum of weighted token losses, and the sum of what they are averaged over.

    Args:
        losses: [N], of tokens.
        sequence: [N] long, the response of each token, 0 to S - 1.
        num_sequences: S. A response without a token counts for nothing.
        aggregation: token-mean: every token counts the same. seq-mean-token-mean: every response does.
            seq-mean-token-sum: a response counts by its length. seq-mean-token-sum-norm: so too, but divided by
            max_length, which does not depend on what was generated.
        totals: if given, value and weight are divided by the denominator of the whole step: the weights of a step then
            sum to 1, and losses with different denominators may be added.
        max_length: tokens; for seq-mean-token-sum-norm.
    """
    check_aggregation(aggregation, max_length)
    lengths = sequence_sums(torch.ones_like(losses), sequence, num_sequences)  # [S]
    if aggregation == "token-mean":
        value, weight = losses.sum(), lengths.sum()
        total = None if totals is None else totals.num_tokens
    else:
        scale = max_length or 1
        shares = losses / lengths[sequence] if aggregation == "seq-mean-token-mean" else losses  # [N]
        value, weight = shares.sum(), (lengths > 0).sum().to(losses.dtype) * scale
        total = None if totals is None else totals.num_sequences * scale
    return WeightedSum(value, weight) if total is None else WeightedSum(value / total, weight / total)
