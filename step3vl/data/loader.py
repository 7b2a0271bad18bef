"""Micro-batches of a run by number, and loaders over them that start where a stopped run left off.

Step i of rank r of R takes samples (i*R + r)*S to (i*R + r)*S + S - 1 of the mixture, S being the samples a step. So
the data of a step do not depend on workers, and what has been consumed is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from step3vl.data.collate import collate
from step3vl.data.mixture import Mixture
from step3vl.data.packing import LossWeight
from step3vl.data.processor import Processor
from step3vl.types import Batch, Example


class PackedBatches(Dataset[Batch]):
    """`batches[start]` is this rank's batch of the step whose first sample, over all ranks, is number `start`.

    A sample that cannot be used is left out and named with its reason in `Batch.skipped`; it never stops a run.
    Samples numbered `stop` and above are left out (None: the mixture is endless).
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        seq_len: int,
        samples_per_step: int,
        loss_weight: LossWeight = "token",
        rank: int = 0,
        num_ranks: int = 1,
        stop: int | None = None,
    ):
        self.mixture, self.processor = mixture, processor
        self.seq_len, self.samples_per_step, self.loss_weight = seq_len, samples_per_step, loss_weight
        self.rank, self.num_ranks, self.stop = rank, num_ranks, stop

    @property
    def stride(self) -> int:
        """Samples of one step over all ranks."""
        return self.samples_per_step * self.num_ranks

    def __getitem__(self, start: int) -> Batch:
        first = start + self.rank * self.samples_per_step
        last = first + self.samples_per_step
        examples: list[Example] = []
        skipped: list[str] = []
        for j in range(first, last if self.stop is None else min(last, self.stop)):
            name, shard, index = self.mixture.sample(j)
            try:
                examples.append(self.processor.encode(shard.read(index), max_tokens=self.seq_len))
            except (ValueError, OSError) as error:
                skipped.append(f"{name}/{shard.key(index)}: {error}")
        return collate(examples, self.seq_len, self.loss_weight, self.processor.pad_id, skipped)


class StepLoader:
    """`num_steps` batches in order, from the first sample; each iteration begins again."""

    def __init__(self, batches: PackedBatches, num_steps: int, num_workers: int = 0):
        self.batches, self.num_steps, self.num_workers = batches, num_steps, num_workers

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        yield from self._load(0, self.num_steps)

    def _load(self, start: int, num_steps: int) -> DataLoader[Batch]:
        """Batches of `num_steps` steps from global sample `start`."""
        stride = self.batches.stride
        starts = range(start, start + num_steps * stride, stride)
        return DataLoader(self.batches, batch_size=None, sampler=starts, num_workers=self.num_workers)


class ResumableLoader(StepLoader):
    """A StepLoader that goes on where it stopped: over epochs, and over restarts through Lightning's checkpoints.

    The state is what was handed out, in steps and in samples over all ranks; nothing is fetched ahead of it, because
    the loader has a length. Samples, not steps, decide where to go on, so the number of ranks may change.
    """

    def __init__(self, batches: PackedBatches, num_steps: int, num_workers: int = 0):
        super().__init__(batches, num_steps, num_workers)
        self.step = 0
        self.sample = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._load(self.sample, self.num_steps - self.step % self.num_steps):
            self.step += 1
            self.sample += self.batches.stride
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "sample": self.sample}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.sample = int(state["step"]), int(state["sample"])
