"""Preferences for reward models, from shards: the same mixture, plan, loader and resuming as for every other stage."""

from __future__ import annotations

from lightning import LightningDataModule
from torch.utils.data import Dataset

from step3vl.data.left_out import read_left_out
from step3vl.data.loader import ResumableLoader, StepLoader
from step3vl.data.mixture import Mixture, Source
from step3vl.data.plan import Cost, SamplePlan, Step
from step3vl.data.preference_batch import Pair, PreferenceBatch, collate_pairs, encode_pair
from step3vl.data.preferences import Preference
from step3vl.data.processor import Processor


class PreferenceBatches(Dataset[PreferenceBatch]):
    """`batches[step]` is the batch of a planned step; a pair that cannot be used is left out and named."""

    def __init__(self, mixture: Mixture, processor: Processor, seq_len: int, share: bool = True):
        self.mixture, self.processor, self.seq_len, self.share = mixture, processor, seq_len, share

    def __getitem__(self, step: Step) -> PreferenceBatch:
        skipped = list(step.skipped)
        pairs: list[Pair] = []
        for draw in (draw for row in step.rows for draw in row):
            shard, index = self.mixture.place(draw)
            try:
                sample = shard.read(index)
                if not isinstance(sample, Preference):
                    raise ValueError("is no preference: it has no fields 'chosen' and 'rejected'")
                pair = encode_pair(self.processor, sample, self.seq_len)
            except (ValueError, OSError) as error:
                skipped.append(f"{draw[0]}/{shard.key(index)}: {error}")
                continue
            pair.chosen.source = pair.rejected.source = draw[0]
            pairs.append(pair)
        return collate_pairs(pairs, self.seq_len, self.processor.pad_id, skipped, self.share)


class PreferenceData(LightningDataModule):
    """Packed batches of preferences from a weighted mixture of shards.

    Args:
        root: folder that holds the shards.
        sources: what to train on, by name: shards relative to root, a weight in pairs, and how often it may repeat.
        seq_len: tokens in a packed row; a pair with a longer answer is left out and reported.
        pairs_per_step: pairs of one micro-batch on one rank.
        num_steps: micro-batches in one epoch of this module; more epochs go on in the mixture.
        share_prompts: both answers share the tokens of their prompt where that saves work; the scores are the same.
        num_workers: processes that prepare batches.
        seed: order of the pairs.
        val_sources: what to validate on; none: no validation.
        val_pairs: pairs of one validation pass, over all ranks.
        max_skipped_share: most of the pairs drawn, as a share, that may turn out unusable; with more the run stops.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, Source],
        seq_len: int,
        pairs_per_step: int,
        num_steps: int,
        share_prompts: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        val_sources: dict[str, Source] | None = None,
        val_pairs: int = 0,
        max_skipped_share: float = 0.05,
    ):
        super().__init__()
        counts = {"seq_len": seq_len, "pairs_per_step": pairs_per_step, "num_steps": num_steps}
        for name, count in counts.items() if not val_sources else [*counts.items(), ("val_pairs", val_pairs)]:
            if count < 1:
                raise ValueError(f"data.{name} must be at least 1, got {count}")
        if not 0 <= max_skipped_share <= 1:
            raise ValueError(f"data.max_skipped_share must lie in 0..1, got {max_skipped_share}")
        self.root, self.sources, self.seed = root, sources, seed
        self.seq_len, self.pairs_per_step, self.num_steps = seq_len, pairs_per_step, num_steps
        self.share_prompts, self.num_workers = share_prompts, num_workers
        self.val_sources, self.val_pairs = val_sources or {}, val_pairs
        self.max_skipped_share = max_skipped_share
        self.processor: Processor | None = None
        self.mixture: Mixture | None = None
        self.val_mixture: Mixture | None = None

    def connect(self, processor: Processor, cost: Cost | None = None) -> None:
        """Take over the processor, bound to the model's image layout. What a pair costs is not needed."""
        self.processor = processor

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.mixture is None:
            self.mixture = Mixture(self.root, self.sources, self.seed)
            total = float(self.pairs_per_step * self.num_steps * self._rank()[1])
            self.mixture.check_repeats(total)
            if self.trainer is None or self.trainer.is_global_zero:
                from rich.console import Console

                Console().print(self.mixture.table(total))
        if self.val_sources and self.val_mixture is None:
            self.val_mixture = Mixture(self.root, self.val_sources, self.seed)

    def train_dataloader(self) -> ResumableLoader:
        if self.mixture is None:
            raise RuntimeError("PreferenceData.setup('fit') must be called before train_dataloader()")
        plan = SamplePlan(self.mixture, self.pairs_per_step, *self._rank())
        left_out = [] if self.trainer is None else read_left_out(self.trainer.default_root_dir)
        return ResumableLoader(self._batches(self.mixture), plan, self.num_steps, self.num_workers, left_out)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        if self.val_mixture is None:
            return []
        rank, num_ranks = self._rank()
        plan = SamplePlan(self.val_mixture, self.pairs_per_step, rank, num_ranks, stop=self.val_pairs)
        num_steps = -(-self.val_pairs // (self.pairs_per_step * num_ranks))
        return StepLoader(self._batches(self.val_mixture), plan, num_steps, self.num_workers)

    def _batches(self, mixture: Mixture) -> PreferenceBatches:
        if self.processor is None:
            raise RuntimeError("PreferenceData.connect(processor) must be called before its loaders are made")
        return PreferenceBatches(mixture, self.processor, self.seq_len, self.share_prompts)

    def _rank(self) -> tuple[int, int]:
        place = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (place["rank"], place["num_replicas"]) if place else (0, 1)
