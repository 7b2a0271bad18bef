"""Data modules for pre-training encoders: the shards of any stage, read as images with captions or as crops.

Order, ranks, workers and resuming are those of `step3vl.data.module`: the same mixture, plan and loader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule

from step3vl.data.crops import CropBatches, CropRecipe
from step3vl.data.left_out import read_left_out
from step3vl.data.loader import ResumableLoader, StepLoader
from step3vl.data.mixture import Mixture, Source
from step3vl.data.pairs import PairBatches
from step3vl.data.plan import SamplePlan
from step3vl.data.processor import Processor
from step3vl.types import ImageSpec


class ImageData(LightningDataModule, ABC):
    """What both kinds share. Sources without images do not belong here: each of their samples is skipped and counted.

    Args:
        root: Folder that holds the shards.
        sources: What to train on, by name: shards relative to root, a weight, and how often it may be repeated.
        samples_per_step: Samples of one micro-batch on one rank.
        num_steps: Micro-batches in one epoch of this module; more epochs go on in the mixture.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. Batches are the same.
        seed: Order of the samples, and all that is drawn for them.
        max_skipped_share: Most of the samples drawn, as a share, that may turn out unusable; with more the run stops.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        samples_per_step: int,
        num_steps: int,
        num_workers: int = 0,
        seed: int = 0,
        max_skipped_share: float = 0.05,
    ):
        super().__init__()
        for name, count in (("samples_per_step", samples_per_step), ("num_steps", num_steps)):
            if count < 1:
                raise ValueError(f"data.{name} must be at least 1, got {count}")
        if not 0 <= max_skipped_share <= 1:
            raise ValueError(f"data.max_skipped_share must lie in 0..1, got {max_skipped_share}")
        self.root, self.sources, self.seed = root, sources, seed
        self.samples_per_step, self.num_steps = samples_per_step, num_steps
        self.num_workers, self.max_skipped_share = num_workers, max_skipped_share
        self.mixture: Mixture | None = None
        self.spec: ImageSpec | None = None
        self.processor: Processor | None = None

    def connect(self, spec: ImageSpec, processor: Processor | None) -> None:
        """Take over what the encoder needs from pixels, and who makes tokens."""
        self.spec, self.processor = spec, processor

    @abstractmethod
    def batches(self, mixture: Mixture) -> Any:
        """The data set that makes a batch from a planned step."""

    def setup(self, stage: str) -> None:
        if stage != "fit" or self.mixture is not None:
            return
        self.mixture = Mixture(self.root, self.sources, self.seed)
        num_steps, num_ranks = self.num_steps, self._rank()[1]
        if self.trainer is not None and self.trainer.max_steps > 0:
            num_steps = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        total = float(num_steps * num_ranks * self.samples_per_step)
        self.mixture.check_repeats(total)
        if self.trainer is None or self.trainer.is_global_zero:
            from rich.console import Console

            Console().print(self.mixture.table(total))

    def train_dataloader(self) -> ResumableLoader:
        if self.mixture is None:
            raise RuntimeError("setup('fit') must be called before train_dataloader()")
        plan = SamplePlan(self.mixture, self.samples_per_step, *self._rank())
        left_out = read_left_out(self.trainer.default_root_dir) if self.trainer is not None else []
        return ResumableLoader(self.batches(self.mixture), plan, self.num_steps, self.num_workers, left_out)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _bound(self) -> ImageSpec:
        if self.spec is None:
            raise RuntimeError("connect(spec, processor) must be called before loaders are made")
        return self.spec


class PairData(ImageData):
    """Images with captions (`step3vl.data.pairs`), and held-out ones for retrieval.

    Args:
        root: Folder that holds the shards.
        sources: What to train on, by name: shards relative to root, a weight, and how often it may be repeated.
        samples_per_step: Pairs of one micro-batch on one rank.
        num_steps: Micro-batches in one epoch of this module; more epochs go on in the mixture.
        max_tokens: Longest caption; longer ones lose their end, and are counted.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. Batches are the same.
        seed: Order of the samples.
        max_skipped_share: Most of the samples drawn, as a share, that may turn out unusable; with more the run stops.
        held_out_every: One of so many samples is never trained on, so that retrieval can be measured; 0: none.
        test_sources: Names of sources of which `step3vl test` finds held-out captions for images, and the reverse.
        test_samples: Most held-out pairs of each of them.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        samples_per_step: int,
        num_steps: int,
        max_tokens: int,
        num_workers: int = 0,
        seed: int = 0,
        max_skipped_share: float = 0.05,
        held_out_every: int = 0,
        test_sources: Sequence[str] = (),
        test_samples: int = 200,
    ):
        super().__init__(root, sources, samples_per_step, num_steps, num_workers, seed, max_skipped_share)
        if max_tokens < 1 or test_samples < 1:
            raise ValueError(
                f"data.max_tokens and data.test_samples must be at least 1, got {max_tokens}, {test_samples}"
            )
        unknown = [name for name in test_sources if name not in sources]
        if unknown or (test_sources and held_out_every < 2):
            raise ValueError(
                f"data.test_sources are names among {', '.join(sources)} and need data.held_out_every of at least 2, "
                f"got {list(test_sources)} and {held_out_every}"
            )
        self.max_tokens, self.held_out_every = max_tokens, held_out_every
        self.test_sources, self.test_samples = list(test_sources), test_samples

    def batches(self, mixture: Mixture, is_held_out: bool = False) -> PairBatches:
        if self.processor is None:
            raise RuntimeError("connect(spec, processor) must be called with a processor before pairs are made")
        spec = self._bound()
        return PairBatches(mixture, self.processor, spec, self.max_tokens, self.held_out_every, is_held_out)

    def test_dataloader(self) -> list[StepLoader]:
        """One loader a source, over about `test_samples` of its held-out pairs; the same on every rank."""
        loaders = []
        for name in self.test_sources:
            mixture = Mixture(self.root, {name: self.sources[name]}, self.seed)
            num = min(self.test_samples * self.held_out_every, mixture.num_samples(name))
            size = self.samples_per_step * self.held_out_every
            plan = SamplePlan(mixture, size, stop=num)
            loaders.append(StepLoader(self.batches(mixture, is_held_out=True), plan, -(-num // size)))
        return loaders


class CropData(ImageData):
    """Crops of images (`step3vl.data.crops`).

    Args:
        root: Folder that holds the shards.
        sources: What to train on, by name: shards relative to root, a weight, and how often it may be repeated.
        samples_per_step: Samples of one micro-batch on one rank.
        num_steps: Micro-batches in one epoch of this module; more epochs go on in the mixture.
        crops: How images are cut and hidden; null: as DINOv3's.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. Batches are the same.
        seed: Order of the samples, and their crops.
        max_skipped_share: Most of the samples drawn, as a share, that may turn out unusable; with more the run stops.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        samples_per_step: int,
        num_steps: int,
        crops: CropRecipe | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_skipped_share: float = 0.05,
    ):
        super().__init__(root, sources, samples_per_step, num_steps, num_workers, seed, max_skipped_share)
        self.crops = crops or CropRecipe()

    def connect(self, spec: ImageSpec, processor: Processor | None) -> None:
        """As `ImageData.connect`; raises ValueError when crops are not whole patches."""
        for name in ("global_size", "local_size"):
            if getattr(self.crops, name) % spec.patch_size:
                raise ValueError(
                    f"data.crops.{name} is {getattr(self.crops, name)} px, which is not a whole number of "
                    f"{spec.patch_size} px patches"
                )
        super().connect(spec, processor)

    def batches(self, mixture: Mixture) -> CropBatches:
        return CropBatches(mixture, self.crops, self._bound().patch_size, self.seed)
