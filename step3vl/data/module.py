"""Training data for any stage: a mixture of shards, planned, encoded, packed, and handed out step by step.

A step is counted in samples (the batch of STEP3-VL's pre-training) or in packed rows (that of its fine-tuning).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from lightning import LightningDataModule

from step3vl.data.left_out import read_left_out
from step3vl.data.loader import PackedBatches, ResumableLoader, StepLoader
from step3vl.data.mixture import Mixture, Source, Unit
from step3vl.data.packing import LossWeight
from step3vl.data.plan import Cost, Plan, RowPlan, SamplePlan
from step3vl.data.processor import Processor
from step3vl.data.sizes import measure_shards

VAL_SAMPLES_PER_STEP = 32
"""Samples of a validation step on one rank where training counts rows."""


class TrainData(LightningDataModule):
    """Packed batches from a weighted mixture of shards.

    Args:
        root: Folder that holds the shards.
        sources: What to train on, by name: shards relative to root, a weight, and how often it may be repeated.
        seq_len: Tokens in a packed row; a longer sample is left out and reported.
        samples_per_step: Samples of one micro-batch on one rank, packed into as many rows as they need.
        rows_per_step: Full rows of one micro-batch on one rank, in place of samples_per_step.
        num_steps: Micro-batches in one epoch of this module; more epochs go on in the mixture.
        mix_by: What weights are shares of: samples, or tokens (visual ones included).
        max_views_per_row: Most views (crops and global views) in a row, when rows are counted; null: no limit.
        balance: Give the ranks of a step equal work in FLOPs, not equal numbers of samples.
        loss_weight: What a learnt token counts: token 1, sample 1/n, sqrt 1/sqrt(n) for the n learnt tokens of its
            sample.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. Batches are the same.
        seed: Order of the samples.
        val_sources: What to validate on; none: no validation.
        val_samples: Samples of one validation pass, over all ranks.
        left_out: Micro-batches that are drawn but not trained on: [first, end] pairs, counted from 0 at the run's
            beginning, the end exclusive. A run whose guard rewinds adds its own, in left_out.json of its folder.
        max_skipped_share: Most of the samples drawn, as a share, that may turn out unusable; with more the run stops.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        seq_len: int,
        num_steps: int,
        samples_per_step: int | None = None,
        rows_per_step: int | None = None,
        mix_by: Unit = "samples",
        max_views_per_row: int | None = None,
        balance: bool = False,
        loss_weight: LossWeight = "token",
        num_workers: int = 0,
        seed: int = 0,
        val_sources: dict[str, Source] | None = None,
        val_samples: int = 0,
        left_out: Sequence[tuple[int, int]] = (),
        max_skipped_share: float = 0.05,
    ):
        super().__init__()
        if (samples_per_step is None) == (rows_per_step is None):
            raise ValueError(
                "a step is counted in samples or in rows: give data.samples_per_step or data.rows_per_step, and null "
                f"for the other; got {samples_per_step} and {rows_per_step}"
            )
        counts = {
            "seq_len": seq_len,
            "samples_per_step": samples_per_step,
            "rows_per_step": rows_per_step,
            "num_steps": num_steps,
            "max_views_per_row": max_views_per_row,
        }
        if val_sources:
            counts["val_samples"] = val_samples
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if max_views_per_row is not None and rows_per_step is None:
            raise ValueError(
                "max_views_per_row needs rows_per_step: a step of samples_per_step samples takes all of them"
            )
        if not 0 <= max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share must lie in 0..1, got {max_skipped_share}")
        self.root, self.sources, self.seed = root, sources, seed
        if any(not 0 <= first < end for first, end in left_out):
            raise ValueError(f"left_out must be pairs [first, end] with 0 <= first < end, got {list(left_out)}")
        self.left_out = [(first, end) for first, end in left_out]
        self.max_skipped_share = max_skipped_share
        self.seq_len, self.num_steps = seq_len, num_steps
        self.samples_per_step, self.rows_per_step = samples_per_step, rows_per_step
        self.mix_by, self.balance = mix_by, balance
        self.max_views_per_row = max_views_per_row
        self.loss_weight, self.num_workers = loss_weight, num_workers
        self.val_sources, self.val_samples = val_sources or {}, val_samples
        self.processor: Processor | None = None
        self.cost: Cost | None = None
        self.mixture: Mixture | None = None
        self.val_mixture: Mixture | None = None

    def connect(self, processor: Processor, cost: Cost | None = None) -> None:
        """Take over the processor, bound to the model's image layout, and the FLOPs that a sample costs the model."""
        self.processor, self.cost = processor, cost

    @property
    def is_measured(self) -> bool:
        """Whether the plan needs to know what every sample costs before it is read."""
        return self.rows_per_step is not None or self.mix_by == "tokens" or self.balance

    def prepare_data(self) -> None:
        """Measure what was not measured before, once a machine, with all its cores."""
        if not self.is_measured:
            return
        from rich.console import Console

        start_s, console = time.monotonic(), Console()
        shards = Mixture(self.root, self.sources, self.seed, self.mix_by).shards
        num = measure_shards(shards, self._bound(), len(os.sched_getaffinity(0)))
        if num:
            seconds = time.monotonic() - start_s
            console.print(f"measured the samples of {num} shards in {seconds:.1f} s; kept beside them", highlight=False)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.mixture is None:
            mixture = Mixture(self.root, self.sources, self.seed, self.mix_by)
            if self.is_measured:
                mixture.measure(self._bound(), self.seq_len)
            total = self._total(mixture)
            mixture.check_repeats(total)
            if self.trainer is None or self.trainer.is_global_zero:
                from rich.console import Console

                Console().print(mixture.table(total))
            self.mixture = mixture
        if self.val_sources and self.val_mixture is None:
            self.val_mixture = Mixture(self.root, self.val_sources, self.seed)

    def train_dataloader(self) -> ResumableLoader:
        if self.mixture is None:
            raise RuntimeError("TrainData.setup('fit') must be called before train_dataloader()")
        plan = self._plan(self.mixture)
        left_out = self.left_out + (read_left_out(self.trainer.default_root_dir) if self.trainer is not None else [])
        return ResumableLoader(self._batches(self.mixture), plan, self.num_steps, self.num_workers, left_out)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        if self.val_mixture is None:
            return []
        size = self.samples_per_step or VAL_SAMPLES_PER_STEP
        rank, num_ranks = self._rank()
        plan = SamplePlan(self.val_mixture, size, rank, num_ranks, stop=self.val_samples)
        num_steps = -(-self.val_samples // (size * num_ranks))
        return StepLoader(self._batches(self.val_mixture), plan, num_steps, self.num_workers)

    # ------------------------------------------------------------------------------------------------ inside

    def _plan(self, mixture: Mixture) -> Plan:
        rank, num_ranks = self._rank()
        if self.balance and self.cost is None:
            raise RuntimeError("TrainData.connect(processor, cost) must give the cost of a sample for balance: true")
        cost = self.cost if self.balance else None
        if self.samples_per_step is not None:
            return SamplePlan(mixture, self.samples_per_step, rank, num_ranks, cost)
        assert self.rows_per_step is not None
        return RowPlan(mixture, self.rows_per_step, self.seq_len, rank, num_ranks, self.max_views_per_row, cost)

    def _batches(self, mixture: Mixture) -> PackedBatches:
        return PackedBatches(mixture, self._bound(), self.seq_len, self.loss_weight)

    def _bound(self) -> Processor:
        if self.processor is None:
            raise RuntimeError("TrainData.connect(processor) must be called before its loaders are made")
        return self.processor

    def _total(self, mixture: Mixture) -> float:
        """Samples or tokens of the run, over all ranks; rows are counted as full."""
        num_steps, num_ranks = self.num_steps, self._rank()[1]
        if self.trainer is not None and self.trainer.max_steps > 0:
            num_steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        if self.mix_by == "samples" and self.samples_per_step is not None:
            return float(num_steps * self.samples_per_step * num_ranks)
        means = {name: mixture.num_tokens(name) / mixture.num_samples(name) for name in self.sources}
        shares = mixture.shares()
        if self.rows_per_step is not None:
            tokens = float(num_steps * self.rows_per_step * num_ranks * self.seq_len)
            return tokens if self.mix_by == "tokens" else tokens / sum(means[n] * shares[n] for n in means)
        samples = float(num_steps * (self.samples_per_step or 0) * num_ranks)
        return samples / sum(shares[n] / means[n] for n in means)  # shares of tokens: so many samples a token

    def _rank(self) -> tuple[int, int]:
        """Rank and number of ranks among those that see different data (ranks of one model replica see the same)."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)
