"""Which samples each step holds, for all ranks at once and before anything is decoded.

A step is either a number of samples a rank (`SamplePlan`; STEP3-VL counts the batch of pre-training so) or a number of
full rows a rank (`RowPlan`; its batch of supervised fine-tuning). Every rank plans the same and takes its own part,
and the state of a plan is a few kilobytes that do not depend on ranks or workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Self

from step3vl.data.draws import draws_of
from step3vl.data.mixture import Draw, Mixture
from step3vl.data.packing import Packer
from step3vl.data.shuffle import mix
from step3vl.types import Size

Cost = Callable[[Size], float]
"""FLOPs of a sample."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank takes in one step."""

    rows: tuple[tuple[Draw, ...], ...]
    """Samples by row; `is_packed` False: one list, still to be packed into rows."""
    is_packed: bool
    skipped: tuple[str, ...] = ()
    """Sentences about samples that were left out; rank 0 has them all."""


class Plan(ABC):
    """An endless sequence of steps: `next(plan)` is the next one of this rank."""

    def __init__(self, mixture: Mixture, rank: int = 0, num_ranks: int = 1):
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must lie in 0..{num_ranks - 1}, got {rank}")
        self.mixture, self.rank, self.num_ranks = mixture, rank, num_ranks
        self.draws = draws_of(mixture)

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> Step:
        """This rank's part of the next step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on; JSON and the same on every rank."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with any number of ranks."""


class SamplePlan(Plan):
    """Steps of `samples_per_step` samples a rank.

    Args:
        mixture: where samples come from; must be measured when `cost` is given.
        samples_per_step: samples of one rank.
        rank: this rank.
        num_ranks: ranks that see different data.
        cost: FLOPs of a sample; given, ranks get samples of equal work, not of equal number. None: equal numbers.
        stop: samples, over all ranks, after which steps are empty; None: the plan is endless.
    """

    def __init__(
        self,
        mixture: Mixture,
        samples_per_step: int,
        rank: int = 0,
        num_ranks: int = 1,
        cost: Cost | None = None,
        stop: int | None = None,
    ):
        super().__init__(mixture, rank, num_ranks)
        self.samples_per_step, self.cost = samples_per_step, cost
        self.stop, self.num_drawn = stop, 0

    def __next__(self) -> Step:
        drawn: list[Draw] = []
        stride = self.samples_per_step * self.num_ranks
        for _ in range(stride if self.stop is None else min(stride, self.stop - self.num_drawn)):
            drawn.append(next(self.draws))
        self.num_drawn += len(drawn)
        if self.cost is None or self.num_ranks == 1:
            first = self.rank * self.samples_per_step
            return Step((tuple(drawn[first : first + self.samples_per_step]),), is_packed=False)
        costs = [0.0 if (size := self.mixture.size(d)).num_tokens < 0 else self.cost(size) for d in drawn]
        mine = deal(costs, self.num_ranks)[self.rank]
        return Step((tuple(drawn[i] for i in mine),), is_packed=False)

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws.state_dict(), "num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws.load_state_dict(state["draws"])
        self.num_drawn = int(state["num_drawn"])


class RowPlan(Plan):
    """Steps of `rows_per_step` packed rows a rank, from rows that stay open until they are full.

    Args:
        mixture: where samples come from; must be measured.
        rows_per_step: rows of one rank.
        seq_len: tokens of a row.
        rank: this rank.
        num_ranks: ranks that see different data.
        max_views: most views in a row; None: no limit.
        cost: FLOPs of a sample; given, the ranks of a step get rows of nearly equal work.
        balance_steps: steps that are planned at once for that. With one row a rank, rows of equal work are looked for
            among this many steps.
    """

    def __init__(
        self,
        mixture: Mixture,
        rows_per_step: int,
        seq_len: int,
        rank: int = 0,
        num_ranks: int = 1,
        max_views: int | None = None,
        cost: Cost | None = None,
        balance_steps: int = 8,
    ):
        super().__init__(mixture, rank, num_ranks)
        self.rows_per_step, self.max_views, self.cost = rows_per_step, max_views, cost
        self.packer = Packer(seq_len, max_views)
        self.balance_steps = balance_steps if cost is not None and num_ranks > 1 else 1
        """Steps of a pool: planned at once, dealt to steps and ranks so that their work is equal."""
        self._ready: list[list] = []  # rows that are planned or left from before, not dealt yet
        self._skipped: list[str] = []
        self._pool: list[list[list[int]]] = []  # step -> rank -> rows of `_rows`
        self._rows: list[list] = []
        self._done = 0
        self._start = self._snapshot()

    def __next__(self) -> Step:
        if self._done == len(self._pool):
            self._plan_pool()
        mine = self._pool[self._done][self.rank]
        self._done += 1
        skipped = tuple(self._skipped) if self.rank == 0 else ()
        self._skipped = []
        return Step(tuple(tuple((name, n) for name, n in self._rows[i]) for i in mine), True, skipped)

    def state_dict(self) -> dict[str, Any]:
        pool = {"num_ranks": self.num_ranks, "rows_per_step": self.rows_per_step, "balance_steps": self.balance_steps}
        return {**self._start, "done": self._done, "balanced": self.cost is not None, "pool": pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rows that were planned for a step which did not come are the first of the next ones.

        Raises ValueError for another row length, other sources, or when balance was switched on or off.
        """
        if state["balanced"] != (self.cost is not None):
            raise ValueError(
                f"data.balance was {str(state['balanced']).lower()} in the run to resume; it cannot change in mid-run"
            )
        self.draws.load_state_dict(state["draws"])
        self.packer.load_state_dict(state["packer"])
        self._ready = [list(row) for row in state["ready"]]
        self._pool, self._done = [], 0
        own = {name: getattr(self, name) for name in state["pool"]}
        if state["done"]:  # the pool that was being handed out, once more
            vars(self).update(state["pool"])
            self._plan_pool()
            self._done = state["done"]
            if own != state["pool"]:
                left = [i for step in self._pool[self._done :] for hand in step for i in hand]
                self._ready = [self._rows[i] for i in left] + self._ready
                self._pool, self._done = [], 0
                vars(self).update(own)
        self._skipped = []  # they were named before
        if not self._pool:
            self._start = self._snapshot()

    # ------------------------------------------------------------------------------------------------ inside

    def _snapshot(self) -> dict[str, Any]:
        packer = self.packer.state_dict()
        return {"draws": self.draws.state_dict(), "packer": packer, "ready": [list(row) for row in self._ready]}

    def _plan_pool(self) -> None:
        """Rows of the next `balance_steps` steps, dealt to steps and ranks."""
        self._start = self._snapshot()
        num_rows = self.balance_steps * self.num_ranks * self.rows_per_step
        while len(self._ready) < num_rows:
            self._ready += self._pack(next(self.draws))
        self._rows, self._ready = self._ready[:num_rows], self._ready[num_rows:]
        self._done = 0
        ranks, per_rank = self.num_ranks, self.rows_per_step
        order = list(range(num_rows))
        costs = [0.0] * num_rows
        if self.cost is not None and ranks > 1:
            size = self.mixture.size
            costs = [sum(self.cost(size((name, n))) for name, n in row) for row in self._rows]
            if per_rank == 1:  # rows of like work make a step, and the steps are shuffled again
                order.sort(key=lambda i: costs[i])
        steps = [order[i : i + ranks * per_rank] for i in range(0, num_rows, ranks * per_rank)]
        steps.sort(key=lambda rows: mix(self.mixture.seed, *rows) if per_rank == 1 else rows[0])
        self._pool = []
        for rows in steps:
            dealt = deal([costs[i] for i in rows], ranks, per_rank)
            self._pool.append([[rows[k] for k in hand] for hand in dealt])

    def _pack(self, draw: Draw) -> Sequence[list]:
        size = self.mixture.size(draw)
        num_views = size.num_crops + size.num_global_views
        reason = ""
        if size.num_tokens < 0:
            reason = "cannot be encoded"
        elif size.num_tokens > self.packer.seq_len:
            reason = f"has {size.num_tokens} tokens and seq_len is {self.packer.seq_len}"
        elif self.max_views is not None and num_views > self.max_views:
            reason = f"has {num_views} views (crops and global views) and max_views_per_row is {self.max_views}"
        if not reason:
            return self.packer.add(draw, size.num_tokens, num_views)
        shard, index = self.mixture.place(draw)
        self._skipped.append(f"{draw[0]}/{shard.key(index)}: {reason}")
        return ()


def deal(costs: Sequence[float], num_hands: int, per_hand: int | None = None) -> list[list[int]]:
    """Indices of `costs` in `num_hands` hands of nearly equal sum: the dearest first, each to the poorest hand.

    per_hand: every hand holds exactly so many; None: any number, but none is empty while there is enough.
    Raises ValueError when the number of costs is not num_hands x per_hand.
    """
    if per_hand is not None and len(costs) != num_hands * per_hand:
        raise ValueError(f"{len(costs)} costs cannot be dealt to {num_hands} hands of {per_hand}")
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    poorest = [(0.0, 0, h) for h in range(num_hands)]  # a heap of (sum, cards, hand)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, num, h = heappop(poorest)
        hands[h].append(i)
        if per_hand is None or num + 1 < per_hand:
            heappush(poorest, (total + costs[i], num + 1, h))
    return [sorted(hand) for hand in hands]
