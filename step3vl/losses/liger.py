"""Liger's fused linear cross-entropy (the optional package liger-kernel), for the batches to which it applies.

It sums over tokens and knows no weight of a single token: its summing form scales the finished gradient by one factor,
and its per-token form computes all logits a second time. It also gives no gradient to the weights of a layer whose
inputs need none.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def is_installed() -> bool:
    return find_spec("liger_kernel") is not None


def why_not(rows: Tensor, weights: Tensor) -> str | None:
    """Why Liger cannot compute this sum exactly and fast; None when it can. rows [n,D], weights [n], n at least 1."""
    if torch.is_grad_enabled() and not rows.requires_grad:
        return "the hidden states need no gradient"
    if not bool((weights == weights[0]).all()):
        return "tokens differ in weight (data.loss_weight: sample or sqrt)"
    return None


def liger_cross_entropy(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor, z_loss: float = 0.0
) -> Tensor:
    """As `step3vl.losses.linear.linear_cross_entropy`, where `why_not` is None. Returns a scalar in fp32.

    Liger decides itself how many logits exist at a time; weights are summed in fp32.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    total = liger_fused_linear_cross_entropy(
        rows,
        weight,
        labels,
        bias=bias,
        lse_square_scale=z_loss,
        reduction="sum",
        accum_dtype=torch.float32,
    )
    return total.float() * weights[0]
