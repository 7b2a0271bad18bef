"""Attention on CPUs, where calls are dear and bfloat16 products are fast: documents by groups, plain products.

torch's CPU kernel for attention multiplies in float32 at best. With bfloat16 instructions, plain products, a softmax
that is computed in float32, and products again are two to three times faster, as exact as transformers' eager
attention.

Shapes: T tokens of the flattened row, P of the padded groups, H query heads, K key heads, d width of a head; g
documents of a group, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SPARE_PAIRS = 2**15
"""Pairs of tokens that padding may add to a group: about what another call would cost."""
LONGEST = 2048
"""Tokens up to which causal products, which compute every pair, beat a kernel that leaves out later keys."""
PART_BYTES = 2**24
"""Attention weights made at a time: larger buffers fall out of the cache, and come from the system page by page."""
KEPT_BYTES = 2**28
"""Attention weights of a call that are kept for backward; more are made again in backward."""
MOST_BYTES = 2**28
"""Attention weights of one sequence that products are used for at all."""


def products_apply(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, dropout: float = 0.0) -> bool:
    """Whether `attend_by_products` is the faster way: a CPU, bfloat16, no dropout, and not too long."""
    if value.device.type != "cpu" or value.dtype != torch.bfloat16 or dropout:
        return False
    fits = query[0, ..., 0].numel() * key.shape[2] * 2 <= MOST_BYTES
    return fits and not (is_causal and query.shape[2] > LONGEST)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Attention [n,H,T,d] over keys and values [n,K,T,d], with K dividing H, as two batched matrix products."""
    num_bytes = query[..., 0].numel() * key.shape[2] * query.element_size()
    size = max(1, len(query) * PART_BYTES // num_bytes)
    parts = [(*part, is_causal, scale) for part in zip(*(x.split(size) for x in (query, key, value)))]
    if num_bytes > KEPT_BYTES and torch.is_grad_enabled():
        return torch.cat([checkpoint(_by_products, *part, use_reentrant=False) for part in parts])
    return torch.cat([_by_products(*part) for part in parts]) if len(parts) > 1 else _by_products(*parts[0])


def _by_products(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    n, num_heads, length, width = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    q = query.reshape(n * num_kv_heads, -1, width)  # [nK,T*H/K,d]
    k, v = (x.reshape(n * num_kv_heads, num_keys, width) for x in (key, value))
    scale = width**-0.5 if scale is None else scale
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)  # [nK,T*H/K,T]
    if is_causal:
        later = torch.full((length, num_keys), float("-inf"), dtype=q.dtype).triu_(1)
        scores = scores.unflatten(1, (-1, length)).add_(later).flatten(1, 2)
    return torch.bmm(scores.softmax(-1), v).view(n, num_heads, length, width)


class Groups(NamedTuple):
    """How documents of a flattened row are laid out for attention: documents of similar length padded to one."""

    sizes: list[tuple[int, int]]  # (g, L) of each group
    place: Tensor  # [P] row of the token at each place of all groups; 0 at padding
    is_padding: Tensor  # [P]
    row: Tensor  # [T] place of each row


def group(lengths: Sequence[int]) -> Groups:
    """Longest documents first; a group is closed where padding would add more than SPARE_PAIRS pairs of tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    spare = 0
    for i in order:
        added = lengths[groups[-1][0]] ** 2 - lengths[i] ** 2 if groups else 0
        if not groups or spare + added > SPARE_PAIRS:
            groups.append([])
            spare = added = 0
        groups[-1].append(i)
        spare += added
    sizes = [(len(members), lengths[members[0]]) for members in groups]
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    places, paddings = [], []
    for members, (_, longest) in zip(groups, sizes):
        column = torch.arange(longest)  # [L]
        is_padding = column >= length[members, None]  # [g,L]
        places.append((start[members, None] + column).masked_fill(is_padding, 0).flatten())
        paddings.append(is_padding.flatten())
    place, is_padding = torch.cat(places), torch.cat(paddings)
    row = torch.empty(int(length.sum()), dtype=torch.long)
    row[place[~is_padding]] = (~is_padding).nonzero().squeeze(1)
    return Groups(sizes, place, is_padding, row)


def attend_by_groups(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, groups: Groups
) -> Tensor:
    """Attention inside every document: query [1,H,T,d], key and value [1,K,T,d] -> [1,T,H,d].

    `attend` must be causal: padding follows the tokens of a document, so that no token sees it.
    """
    q, k, v = (
        _Rows.apply(x.transpose(1, 2)[0], groups.place, groups.row, None) for x in (query, key, value)
    )  # [P,H,d]
    num_rows = [number * longest for number, longest in groups.sizes]
    mixed = []
    for size, *parts in zip(groups.sizes, *(x.split(num_rows) for x in (q, k, v))):
        found = attend(*(x.unflatten(0, size).transpose(1, 2) for x in parts))  # [g,H,L,d]
        mixed.append(found.transpose(1, 2).flatten(0, 1))  # [g*L,H,d]
    return _Rows.apply(torch.cat(mixed), groups.row, groups.place, groups.is_padding)[None]


class _Rows(torch.autograd.Function):
    """Rows of x by number, where every row that counts is taken once: so the gradient is rows by number, too.

    `back` holds, for each row of x, the number that took it; rows that `unused` marks were not taken.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, back: Tensor, unused: Tensor | None) -> Tensor:
        ctx.back, ctx.unused = back, unused
        return x.flatten(1).index_select(0, take).view(-1, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        found = gradient.flatten(1).index_select(0, ctx.back).view(-1, *gradient.shape[1:])
        return found if ctx.unused is None else found.masked_fill_(ctx.unused[:, None, None], 0), None, None, None
