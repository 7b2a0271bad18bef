"""Rows of all ranks, with gradient: what makes a loss over pairs of samples the same on any number of ranks.

Without several ranks nothing happens. Ranks may hold different numbers of rows.

Shapes: n rows of this rank, N rows of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def num_ranks() -> int:
    """Processes of the run; 1 where there is no process group."""
    is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_running else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks of a tensor that needs no gradient."""
    if num_ranks() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows [n,...] of this rank -> rows [N,...] of all ranks, in the order of ranks, and where this rank's begin.

    Backward sums the gradients that all ranks have for a row on the rank that it came from. Gradients that are then
    averaged over ranks and multiplied by their number are those of one rank with all rows, if each rank's loss is the
    part of the whole loss that belongs to its own rows.
    """
    if num_ranks() == 1:
        return rows, 0
    sizes = row_counts(rows)
    first = sum(sizes[: torch.distributed.get_rank()])
    gathered: Tensor = _Gather.apply(rows, sizes)
    return gathered, first


def row_counts(rows: Tensor) -> list[int]:
    """How many rows each rank holds."""
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(num_ranks())]
    torch.distributed.all_gather(counts, counts[0].new_tensor([len(rows)]))
    return [int(count) for count in counts]


class _Gather(torch.autograd.Function):
    """Pads to the longest rank, gathers, cuts the padding off."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.first, ctx.num_rows = sum(sizes[: torch.distributed.get_rank()]), len(rows)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.first : ctx.first + ctx.num_rows], None
