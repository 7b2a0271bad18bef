"""Training data for any stage: a mixture of shards, encoded, packed, and handed out step by step.

The batch is counted in samples, as in the STEP3-VL report; the packing decides how many rows they fill.
"""

from __future__ import annotations

from lightning import LightningDataModule

from step3vl.data.loader import PackedBatches, ResumableLoader, StepLoader
from step3vl.data.mixture import Mixture, Source
from step3vl.data.packing import LossWeight
from step3vl.data.processor import Processor


class TrainData(LightningDataModule):
    """Packed batches from a weighted mixture of shards.

    Args:
        root: Folder that holds the shards.
        sources: What to train on, by name: shards relative to root, and a weight.
        seq_len: Tokens in a packed row; a longer sample is left out and reported.
        samples_per_step: Samples of one micro-batch on one rank.
        num_steps: Micro-batches in one epoch of this module; more epochs go on in the mixture.
        loss_weight: What a learnt token counts: token 1, sample 1/n, sqrt 1/sqrt(n) for the n learnt tokens of its
            sample.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. Batches are the same.
        seed: Order of the samples.
        val_sources: What to validate on; none: no validation.
        val_samples: Samples of one validation pass, over all ranks.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        seq_len: int,
        samples_per_step: int,
        num_steps: int,
        loss_weight: LossWeight = "token",
        num_workers: int = 0,
        seed: int = 0,
        val_sources: dict[str, Source] | None = None,
        val_samples: int = 0,
    ):
        super().__init__()
        counts = {"seq_len": seq_len, "samples_per_step": samples_per_step, "num_steps": num_steps}
        if val_sources:
            counts["val_samples"] = val_samples
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.root, self.sources, self.seed = root, sources, seed
        self.seq_len, self.samples_per_step, self.num_steps = seq_len, samples_per_step, num_steps
        self.loss_weight, self.num_workers = loss_weight, num_workers
        self.val_sources, self.val_samples = val_sources or {}, val_samples
        self.processor: Processor | None = None
        self.mixture: Mixture | None = None
        self.val_mixture: Mixture | None = None

    def connect(self, processor: Processor) -> None:
        """Take over the processor, which must be bound to the model's image layout."""
        self.processor = processor

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.mixture is None:
            self.mixture = Mixture(self.root, self.sources, self.seed)
            if self.trainer is None or self.trainer.is_global_zero:
                from rich.console import Console

                Console().print(self.mixture.table(self.num_steps * self._stride()))
        if self.val_sources and self.val_mixture is None:
            self.val_mixture = Mixture(self.root, self.val_sources, self.seed)

    def train_dataloader(self) -> ResumableLoader:
        if self.mixture is None:
            raise RuntimeError("TrainData.setup('fit') must be called before train_dataloader()")
        return ResumableLoader(self._batches(self.mixture), self.num_steps, self.num_workers)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        if self.val_mixture is None:
            return []
        num_steps = -(-self.val_samples // self._stride())
        return StepLoader(self._batches(self.val_mixture, stop=self.val_samples), num_steps, self.num_workers)

    def _batches(self, mixture: Mixture, stop: int | None = None) -> PackedBatches:
        if self.processor is None:
            raise RuntimeError("TrainData.connect(processor) must be called before its loaders are made")
        rank, num_ranks = self._rank()
        return PackedBatches(
            mixture, self.processor, self.seq_len, self.samples_per_step, self.loss_weight, rank, num_ranks, stop
        )

    def _stride(self) -> int:
        return self.samples_per_step * self._rank()[1]

    def _rank(self) -> tuple[int, int]:
        """Rank and number of ranks among those that see different data (ranks of one model replica see the same)."""
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)
