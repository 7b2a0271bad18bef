"""Prompts for reinforcement learning, from the same shards as every other stage: samples with a checkable answer.

A step holds a number of prompts a rank. Samples come undecoded but for their images; what has no answer, or does not
fit the model, is left out and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import Dataset

from step3vl.data.left_out import read_left_out
from step3vl.data.loader import ResumableLoader
from step3vl.data.mixture import Draw, Mixture, Source
from step3vl.data.plan import Cost, SamplePlan, Step
from step3vl.data.processor import Processor
from step3vl.types import Prompt, Sample


@dataclass(slots=True, kw_only=True)
class Rephrased(Sample):
    """A sample whose question reaches the model as another prompt; its own stays with the rewards."""

    asked: Prompt


@dataclass(slots=True, kw_only=True)
class PromptBatch:
    """The prompts of one rank in one step, in the order drawn."""

    samples: list[Sample] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # for each sample: the mixture's source it was drawn from
    draws: list[Draw] = field(default_factory=list)  # for each sample: its name in the endless run
    skipped: list[str] = field(default_factory=list)  # "id: reason" of samples that could not be used

    @property
    def sample_ids(self) -> list[str]:
        return [sample.id for sample in self.samples]


def prompt_of(sample: Sample) -> Prompt:
    """What a model is shown of a sample."""
    if isinstance(sample, Rephrased):
        return sample.asked
    return Prompt(messages=sample.conversation, images=sample.images)


class PromptBatches(Dataset[PromptBatch]):
    """`batches[step]` holds the samples of a planned step, read and checked."""

    def __init__(self, mixture: Mixture, processor: Processor, max_tokens: int):
        self.mixture, self.processor, self.max_tokens = mixture, processor, max_tokens

    def __getitem__(self, step: Step) -> PromptBatch:
        batch = PromptBatch(skipped=list(step.skipped))
        for draw in (draw for row in step.rows for draw in row):
            try:
                sample = self.read(draw)
                self._check(sample)
            except (ValueError, OSError) as error:
                batch.skipped.append(f"{draw[0]}/{self.name_of(draw)}: {error}")
                continue
            batch.samples.append(sample)
            batch.sources.append(draw[0])
            batch.draws.append(draw)
        return batch

    def read(self, draw: Draw) -> Sample:
        """A sample that was drawn before."""
        shard, index = self.mixture.place(draw)
        return shard.read(index)

    def name_of(self, draw: Draw) -> str:
        """Key of the sample that is drawn."""
        shard, index = self.mixture.place(draw)
        return shard.key(index)

    def _check(self, sample: Sample) -> None:
        if sample.answer is None:
            raise ValueError("field 'answer' is null, so that no answer to it can be judged")
        example = self.processor.encode_prompt(prompt_of(sample), sample.id)
        if len(example.input_ids) > self.max_tokens:
            length = len(example.input_ids)
            raise ValueError(f"its prompt has {length} tokens and data.max_prompt_tokens is {self.max_tokens}")


class PromptData(LightningDataModule):
    """Prompts from a weighted mixture of shards.

    Args:
        root: folder that holds the shards.
        sources: what to ask, by name: shards relative to root, a weight in samples, and how often it may be repeated.
        prompts_per_step: prompts of one iteration on one rank.
        num_steps: iterations in one epoch of this module; more epochs go on in the mixture.
        max_prompt_tokens: longer prompts are left out and reported.
        num_workers: processes that read and check prompts.
        seed: order of the prompts.
        max_skipped_share: most of the samples drawn, as a share, that may turn out unusable; with more the run stops.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        prompts_per_step: int,
        num_steps: int,
        max_prompt_tokens: int,
        num_workers: int = 0,
        seed: int = 0,
        max_skipped_share: float = 0.05,
    ):
        super().__init__()
        counts = {
            "prompts_per_step": prompts_per_step,
            "num_steps": num_steps,
            "max_prompt_tokens": max_prompt_tokens,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0 <= max_skipped_share <= 1:
            raise ValueError(f"max_skipped_share must lie in 0..1, got {max_skipped_share}")
        self.root, self.sources, self.seed = root, sources, seed
        self.prompts_per_step, self.num_steps = prompts_per_step, num_steps
        self.max_prompt_tokens, self.num_workers = max_prompt_tokens, num_workers
        self.max_skipped_share = max_skipped_share
        self.processor: Processor | None = None
        self.mixture: Mixture | None = None

    def connect(self, processor: Processor, cost: Cost | None = None) -> None:
        """Take over the processor, bound to the model's image layout. What a sample costs is not needed."""
        self.processor = processor

    def setup(self, stage: str) -> None:
        if stage != "fit" or self.mixture is not None:
            return
        self.mixture = self.make_mixture()
        num_ranks = self._rank()[1]
        total = float(self.prompts_per_step * self.num_steps * num_ranks)
        self.mixture.check_repeats(total)
        if self.trainer is None or self.trainer.is_global_zero:
            from rich.console import Console

            Console().print(self.mixture.table(total))

    def make_mixture(self) -> Mixture:
        """The endless order of what is asked."""
        return Mixture(self.root, self.sources, self.seed)

    @property
    def batches(self) -> PromptBatches:
        if self.mixture is None or self.processor is None:
            raise RuntimeError("PromptData.connect(processor) and setup('fit') must be called before its loaders")
        return PromptBatches(self.mixture, self.processor, self.max_prompt_tokens)

    def train_dataloader(self) -> ResumableLoader:
        batches = self.batches
        plan = SamplePlan(batches.mixture, self.prompts_per_step, *self._rank())
        left_out: Sequence[tuple[int, int]] = ()
        if self.trainer is not None:
            left_out = read_left_out(self.trainer.default_root_dir)
        return ResumableLoader(batches, plan, self.num_steps, self.num_workers, left_out)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Samples stay where they are: what is trained on is made of them later."""
        return batch

    def _rank(self) -> tuple[int, int]:
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)
