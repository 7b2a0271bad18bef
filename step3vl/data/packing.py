"""Packing samples into rows of fixed length, and what each of their tokens counts for in the loss.

`first_fit` packs what is at hand and keeps order. `Packer` packs an endless stream: rows that still have room stay open
from step to step, so that rows are 98 % full with short and with long samples. Neither ever splits a sample. Qwen3-VL
weighs tokens by the square root of the sample's length, between counting tokens and counting samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from step3vl.types import IGNORE_INDEX

LossWeight = Literal["token", "sample", "sqrt"]
EXPONENTS: dict[str, float] = {"token": 0.0, "sqrt": -0.5, "sample": -1.0}
"""Weight of a learnt token = (learnt tokens of its sample) ** exponent."""
NOTHING: tuple[()] = ()
NUM_CLASSES = 512
"""Open rows are found by the room they have, in this many steps of a row's length."""


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


class Packer:
    """Best fit over rows that stay open until they are full, or until more than `max_open` are open.

    Args:
        seq_len: tokens of a row.
        max_views: most views (crops and global views) in a row; None: no limit.
        max_open: rows that may be open at once; when one more is needed, the fullest is closed.

    Items are whatever `json` can write. The same items in the same order always give the same rows.
    """

    def __init__(self, seq_len: int, max_views: int | None = None, max_open: int = 32):
        if seq_len < 1 or max_open < 1:
            raise ValueError(f"seq_len and max_open must be at least 1, got {seq_len} and {max_open}")
        self.seq_len, self.max_views, self.max_open = seq_len, max_views, max_open
        self.grain = -(-seq_len // NUM_CLASSES)
        self.num_open = 0
        self._open: list[list[tuple[int, int, list]]] = [[] for _ in range(seq_len // self.grain + 1)]
        """Open rows as (room in tokens, views, items), by their room in whole grains."""
        self._mask = 0
        """Bit c is set when `_open[c]` holds a row."""

    def add(self, item: Any, length: int, num_views: int = 0) -> Sequence[list]:
        """Place one item; returns the rows that this closes (none, one or two), each as the list of its items.

        Raises ValueError for an item that is longer than a row, or that has more views than a row may have.
        """
        if not 0 < length <= self.seq_len:
            raise ValueError(f"an item of {length} tokens cannot be packed into rows of {self.seq_len}")
        if self.max_views is not None and num_views > self.max_views:
            raise ValueError(f"an item of {num_views} views cannot be packed into rows of at most {self.max_views}")
        rows, grain = self._open, self.grain  # what follows runs once a sample of the whole run: no calls
        need = -(-length // grain)
        rest = self._mask >> need
        if rest and num_views and self.max_views is not None:
            number, k = self._with_views(need, self.max_views - num_views)
        else:
            number, k = (need + (rest & -rest).bit_length() - 1, -1) if rest else (0, -1)
        closed: Sequence[list] = NOTHING
        if number:
            stack = rows[number]
            room, views, items = stack.pop(k)
            if not stack:
                self._mask ^= 1 << number
            items.append(item)
        else:
            if self.num_open == self.max_open:
                stack = rows[number := (self._mask & -self._mask).bit_length() - 1]
                closed = [stack.pop()[2]]
                if not stack:
                    self._mask ^= 1 << number
                self.num_open -= 1
            room, views, items = self.seq_len, 0, [item]
            self.num_open += 1
        room -= length
        if room < grain:  # no sample would find it again
            self.num_open -= 1
            return [*closed, items]
        stack = rows[number := room // grain]
        if not stack:
            self._mask |= 1 << number
        stack.append((room, views + num_views, items))
        return closed

    def state_dict(self) -> dict[str, Any]:
        """The open rows: a few kilobytes."""
        return {"seq_len": self.seq_len, "open": [[r, v, list(items)] for rows in self._open for r, v, items in rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises ValueError when it belongs to another row length."""
        if state["seq_len"] != self.seq_len:
            raise ValueError(f"seq_len is {self.seq_len}, but the state to resume from has rows of {state['seq_len']}")
        self._open = [[] for _ in self._open]
        self._mask = self.num_open = 0
        for room, views, items in state["open"]:
            self._open[room // self.grain].append((room, views, list(items)))
            self._mask |= 1 << (room // self.grain)
            self.num_open += 1

    def _with_views(self, need: int, most: int) -> tuple[int, int]:
        """(room in grains, place) of the tightest open row with at least `need` grains and at most `most` views."""
        for number in range(need, len(self._open)):
            for k, row in enumerate(self._open[number]):
                if row[1] <= most:
                    return number, k
        return 0, -1


def weigh(labels: Tensor, loss_weight: LossWeight) -> Tensor:
    """Loss weights [t] of one example from its labels [t]: 1, 1/n or 1/sqrt(n) for its n learnt tokens, 0 elsewhere."""
    if loss_weight not in EXPONENTS:
        raise ValueError(f"loss_weight must be one of {', '.join(EXPONENTS)}, got {loss_weight!r}")
    learnt = labels != IGNORE_INDEX  # [t]
    num_learnt = int(learnt.sum())
    return learnt.float() * (max(num_learnt, 1) ** EXPONENTS[loss_weight])


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
