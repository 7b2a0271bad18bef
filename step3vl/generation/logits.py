"""From hidden states to the next token: logits at a temperature, top-k and top-p, and a draw by inverse distribution.

`scaled_logits` is the arithmetic of every log-probability here; the policy's loss in reinforcement learning uses the
same function, so that both differ by rounding alone. A draw takes one uniform number a row, which may come from
anywhere.

Shapes: R rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CANDIDATES = 512
"""Likeliest tokens in which the share `top_p` is looked for before the whole vocabulary is sorted."""


def scaled_logits(hidden: Tensor, lm_head: nn.Module, temperature: float, image_token_id: int | None) -> Tensor:
    """Logits [R,V] in fp32 of hidden states [R,D], divided by the temperature; with gradient, if hidden has one.

    An image placeholder cannot be said: its logit is -inf. A temperature of 0 (greedy) counts as 1.
    """
    logits = cast(Tensor, lm_head(hidden)).float()  # [R,V]
    if image_token_id is not None:
        logits = logits.index_fill(-1, torch.tensor([image_token_id], device=logits.device), float("-inf"))
    return logits / temperature if temperature not in (0, 1) else logits


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability [R] of one token [R] of each row of scaled logits [R,V]."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def probabilities(logits: Tensor, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """Probabilities [R,V] of scaled logits, zero where top-k, and then top-p of what is left, cut off.

    They add up to 1 only where nothing is cut. Tokens as likely as the last that stays do stay.
    """
    shares = logits.softmax(-1)
    num_tokens = logits.shape[-1]
    if top_k is not None and top_k < num_tokens:
        likeliest = shares.topk(top_k).values  # [R,k], falling
        shares = shares.masked_fill(shares < likeliest[:, -1:], 0.0)
        return shares if top_p >= 1 else _nucleus(shares, likeliest, top_p)
    if top_p >= 1:
        return shares
    likeliest = shares.topk(min(CANDIDATES, num_tokens)).values
    if len(shares) and bool((likeliest.sum(-1) < top_p).any()):
        likeliest = shares.sort(-1, descending=True).values
    return _nucleus(shares, likeliest, top_p)


def _nucleus(shares: Tensor, likeliest: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest likeliest that hold `top_p` of the shares [R,V]; `likeliest` [R,k] holds as much."""
    before = likeliest.cumsum(-1) - likeliest  # [R,k]
    is_kept = before < top_p * shares.sum(-1, keepdim=True)
    last = likeliest.masked_fill(~is_kept, float("inf")).amin(-1, keepdim=True)
    return shares.masked_fill(shares < last, 0.0)


def draw(shares: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [R] by inverse distribution: shares [R,V], of any sum, and numbers [R] float64 from [0, 1).

    The distribution is summed in float64, first block by block, so that likely blocks alone are looked into. A token
    with a share of 0 is never drawn. Shares that are no numbers give any token.
    """
    width = max(1, round(shares.shape[-1] ** 0.5))
    blocks = F.pad(shares, (0, -shares.shape[-1] % width)).unflatten(-1, (-1, width))  # [R,V/width,width]
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [R,V/width]
    block, rest = _first_above(sums, uniform * sums[:, -1])
    inside = blocks[torch.arange(len(shares), device=shares.device), block].double()  # [R,width]
    token, _ = _first_above(inside.cumsum(-1), rest)
    return (block * width + token).clamp_max(shares.shape[-1] - 1)


def _first_above(sums: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The first place [R] where running sums [R,n] are above the goal [R], and what of the goal is left there.

    Rounding may not carry the goal beyond the last sum; sums that are no numbers give the last place.
    """
    total = sums[:, -1]
    goal = torch.minimum(goal, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, goal[:, None], right=True).clamp_max(sums.shape[-1] - 1)  # [R,1]
    left = F.pad(sums, (1, 0)).gather(-1, place).squeeze(-1)
    return place.squeeze(-1), (goal - left).clamp_min(0.0)
