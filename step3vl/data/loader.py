"""Planned steps to packed batches, and loaders over them that start where a stopped run left off.

The training process plans; workers read, encode and pack. So the data of a step do not depend on workers, and what has
been consumed is the state of the plan after the last batch that was handed out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from step3vl.data.collate import collate, collate_rows
from step3vl.data.malloc import worker_init
from step3vl.data.mixture import Draw, Mixture
from step3vl.data.packing import LossWeight
from step3vl.data.plan import Plan, Step
from step3vl.data.processor import Processor
from step3vl.types import Batch, Example


class PackedBatches(Dataset[Batch]):
    """`batches[step]` is the batch of a planned step.

    A sample that cannot be used is left out and named with its reason in `Batch.skipped`; it never stops a run.
    """

    def __init__(self, mixture: Mixture, processor: Processor, seq_len: int, loss_weight: LossWeight = "token"):
        self.mixture, self.processor = mixture, processor
        self.seq_len, self.loss_weight = seq_len, loss_weight

    def __getitem__(self, step: Step) -> Batch:
        skipped = list(step.skipped)
        rows = [self._encode(row, skipped) for row in step.rows]
        if step.is_packed:
            return collate_rows(rows, self.seq_len, self.loss_weight, self.processor.pad_id, skipped)
        return collate(rows[0], self.seq_len, self.loss_weight, self.processor.pad_id, skipped)

    def _encode(self, row: tuple[Draw, ...], skipped: list[str]) -> list[Example]:
        examples: list[Example] = []
        for draw in row:
            shard, index = self.mixture.place(draw)
            try:
                example = self.processor.encode(shard.read(index), max_tokens=self.seq_len)
            except (ValueError, OSError) as error:
                skipped.append(f"{draw[0]}/{shard.key(index)}: {error}")
                continue
            example.source = draw[0]
            examples.append(example)
        return examples


class StepLoader:
    """`num_steps` batches in order, from the plan's beginning; each iteration begins again."""

    def __init__(
        self,
        batches: Dataset,
        plan: Plan,
        num_steps: int,
        num_workers: int = 0,
        left_out: Sequence[tuple[int, int]] = (),
    ):
        self.batches, self.plan, self.num_steps, self.num_workers = batches, plan, num_steps, num_workers
        self.left_out = list(left_out)
        """Planned steps that are not handed out: (first, end) pairs, counted from the plan's beginning."""
        self._state = plan.state_dict()

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in self._load(self._state, self.num_steps):
            yield batch

    def _load(
        self, state: dict[str, Any], num_steps: int, position: int = 0
    ) -> Iterator[tuple[Any, dict[str, Any], int]]:
        """Batches of `num_steps` steps from a state of the plan, each with the state and the position after it."""
        self.plan.load_state_dict(state)
        after: deque[tuple[dict[str, Any], int]] = deque()

        def steps(position: int) -> Iterator[Step]:
            for _ in range(num_steps):
                while any(first <= position < end for first, end in self.left_out):
                    next(self.plan)
                    position += 1
                step = next(self.plan)
                position += 1
                after.append((self.plan.state_dict(), position))
                yield step

        sampler, num_workers = _Once(steps(position)), self.num_workers
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=worker_init,
            generator=torch.Generator(),  # or a new epoch would draw from the training's random numbers
        )
        for batch in loader:
            yield batch, *after.popleft()


class ResumableLoader(StepLoader):
    """A StepLoader that goes on where it stopped: over epochs, and over restarts through Lightning's checkpoints.

    The state is what was handed out: steps, and the plan's own state. It does not depend on the number of ranks.

    step: batches handed out since the run began.
    position: the same, and those left out.
    """

    step = position = 0

    def __iter__(self) -> Iterator[Any]:
        num_steps = self.num_steps - self.step % self.num_steps
        for batch, state, position in self._load(self._state, num_steps, self.position):
            self.step += 1
            self._state, self.position = state, position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "position": self.position, "plan": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "plan" not in state:
            raise ValueError(
                "the checkpoint's data state is of an older form and cannot be resumed; start from weights"
            )
        self.step, self._state = int(state["step"]), state["plan"]
        self.position = int(state.get("position", self.step))


class _Once:
    """A sampler from an iterator."""

    def __init__(self, steps: Iterator[Step]):
        self.steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self.steps
