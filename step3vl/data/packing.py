"""Packing examples into rows of fixed length, and what each of their tokens counts for in the loss.

First-fit keeps order and splits nothing. Qwen3-VL weighs tokens by the square root of the sample's length, between
counting tokens (long answers dominate) and counting samples (each counts the same); all three are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from step3vl.types import IGNORE_INDEX

LossWeight = Literal["token", "sample", "sqrt"]
EXPONENTS: dict[str, float] = {"token": 0.0, "sqrt": -0.5, "sample": -1.0}
"""Weight of a learnt token = (learnt tokens of its sample) ** exponent."""


def first_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each summing to at most `seq_len`; every item goes to the first row with room.

    Raises ValueError for an item longer than `seq_len`. Example: first_fit([5, 4, 3], 8) is [[0, 2], [1]].
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        if length > seq_len:
            raise ValueError(f"item {i} has {length} tokens and cannot be packed into rows of {seq_len}")
        k = next((k for k, left in enumerate(room) if length <= left), None)
        if k is None:
            rows.append([])
            room.append(seq_len)
            k = len(rows) - 1
        rows[k].append(i)
        room[k] -= length
    return rows


def weigh(labels: Tensor, loss_weight: LossWeight) -> Tensor:
    """Loss weights [t] of one example from its labels [t]: 1, 1/n or 1/sqrt(n) for its n learnt tokens, 0 elsewhere."""
    if loss_weight not in EXPONENTS:
        raise ValueError(f"loss_weight must be one of {', '.join(EXPONENTS)}, got {loss_weight!r}")
    learnt = labels != IGNORE_INDEX  # [t]
    num_learnt = int(learnt.sum())
    return learnt.float() * (max(num_learnt, 1) ** EXPONENTS[loss_weight])


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
