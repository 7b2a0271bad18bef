"""Several continuations of one beginning in one document: the beginning is computed once (reinforcement learning).

A document of branches is [beginning][branch 1][branch 2]...; a token of a branch sees the beginning and, causally, its
own branch, but no other. Positions go on from the beginning in every branch, so the result is that of separate
documents. Branch 0 is the beginning.

Shapes: T tokens of the flattened row, t of one document, H query heads, K key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Seen = Tensor | list[int] | None
"""Who sees whom in a document: a mask, or tokens of the beginning and of each branch; None: a plain causal document."""


def seen(lengths: Sequence[int], branches: Tensor) -> list[Seen]:
    """For each document, what suits the device: on a CPU parts, which are attended one by one; elsewhere masks.

    Args:
        lengths: tokens of each document.
        branches: [T] long, the branch of each token of the row.
    """
    if branches.device.type == "cpu":
        return list(branch_parts(lengths, branches))
    return list(branch_masks(lengths, branches))


def branch_parts(lengths: Sequence[int], branches: Tensor) -> list[list[int] | None]:
    """For each document: tokens of the beginning, which may be none, and of each branch; None: it has no branches."""
    parts: list[list[int] | None] = []
    for branch in branches.split(list(lengths)):
        numbers, counts = branch.unique_consecutive(return_counts=True)
        if not bool(numbers.any()):
            parts.append(None)
            continue
        parts.append(([] if int(numbers[0]) == 0 else [0]) + counts.tolist())
    return parts


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
    masks: Sequence[Seen],
    scale: float | None,
) -> Tensor:
    """Attention inside every document: query [1,H,T,d], key and value [1,K,T,d] -> [1,T,H,d] in value's dtype.

    Args:
        causal: attends in a plain document.
        lengths, masks: of the documents, from `seen`.
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
            options: dict[str, Any] = {"scale": scale, "enable_gqa": grouped}
            if isinstance(mask, Tensor):
                found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
            else:
                found = _part_by_part(q, k, v, mask, options)
        mixed.append(found.to(value.dtype))
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous()


def _part_by_part(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[int], options: dict[str, Any]) -> Tensor:
    """[1,H,t,d]: the beginning alone, then each branch over the beginning and itself; no pair is computed in vain."""
    mixed = []
    shared = parts[0]
    (q0, *qs), (k0, *ks), (v0, *vs) = (x.split(list(parts), dim=2) for x in (query, key, value))
    if shared:
        mixed.append(F.scaled_dot_product_attention(q0, k0, v0, is_causal=True, **options))
    for q, k, v in zip(qs, ks, vs):
        mask = torch.ones(q.shape[2], shared + q.shape[2], dtype=torch.bool).tril(shared)  # all of the beginning
        k, v = torch.cat([k0, k], dim=2), torch.cat([v0, v], dim=2)
        mixed.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    return torch.cat(mixed, dim=2)
