"""Several continuations of one beginning in one document: the beginning is computed once (reinforcement learning).

A document of branches is [beginning][branch 1][branch 2]...; a token of a branch sees the beginning and, causally, its
own branch, but no other. Positions go on from the beginning in every branch, so the result is that of separate
documents. Branch 0 is the beginning.

Shapes: T tokens of the flattened row, t of one document, H query heads, K key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def branch_masks(lengths: Sequence[int], branches: Tensor) -> list[Tensor | None]:
    """For each document: [t,t] bool, True where a token (row) sees another; None: a plain causal document.

    Args:
        lengths: tokens of each document.
        branches: [T] long, the branch of each token of the row.
    """
    masks: list[Tensor | None] = []
    for branch in branches.split(list(lengths)):
        if not bool(branch.any()):
            masks.append(None)
            continue
        sees = (branch[:, None] == branch) | (branch == 0)  # [t,t]
        masks.append(sees.tril())
    return masks


def attend_branches(
    causal: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    masks: Sequence[Tensor | None],
    scale: float | None,
) -> Tensor:
    """Attention inside every document: query [1,H,T,d], key and value [1,K,T,d] -> [1,T,H,d] in value's dtype.

    Args:
        causal: attends in a plain document.
        lengths, masks: of the documents, from `branch_masks`.
        scale: factor of the scores; None: 1 / sqrt(d).
    """
    dtype = torch.float32 if value.device.type == "cpu" else value.dtype
    grouped = query.shape[1] != key.shape[1]
    mixed = []
    for q, k, v, mask in zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), masks):
        if mask is None:
            mixed.append(causal(q, k, v))
            continue
        with torch.autocast(value.device.type, enabled=False):
            q, k, v = (x.to(dtype) for x in (q, k, v))
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        mixed.append(found.to(value.dtype))
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous()
