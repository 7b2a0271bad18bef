"""The tiny model, data and stage of pre-training, as `step3vl fit --scale tiny` builds them, for benchmarks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import ArgumentParser

from step3vl.config import compose
from step3vl.data import Processor, Source, TrainData
from step3vl.data.malloc import keep_freed_memory
from step3vl.models import VisionLanguageModel
from step3vl.stages import PretrainStage
from step3vl.types import IGNORE_INDEX, Batch

ROOT = Path(__file__).parents[1]
EXPERIMENT = ROOT / "experiments/step3vl_10b/1_pretrain_phase1.yaml"
LONG_TAILED = {"all": Source(shards="train/*-level[1-4]-*.tar", weight=1.0)}
"""Every kind of sample above level 0: long answers, and images of many crops."""
SAMPLES_PER_STEP = 32


@cache
def corpus() -> Path:
    """./corpus of the checkout, or a small one made for this run."""
    if (ROOT / "corpus/manifest.json").is_file():
        return ROOT / "corpus"
    from step3vl.data.corpus.make import make_corpus

    folder = TemporaryDirectory()
    corpus.folder = folder  # type: ignore[attr-defined]  # lives as long as the process
    subsets = compose([str(ROOT / "step3vl/configs/tiny/corpus/default.yaml")]).config["splits"]["train"]
    few = {name: {level: min(num, 60) for level, num in levels.items()} for name, levels in subsets.items()}
    splits = {"train": few}
    make_corpus(Path(folder.name), {"turns": 6, "samples_per_shard": 2000, "splits": splits}, seed=0, num_processes=1)
    return Path(folder.name)


def stage(optimizer: Any = None) -> PretrainStage:
    """The tiny vision-language model in its stage, with weights drawn afresh; no output layer starts at zero.

    The default optimizer is the report's AdamW.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command line does
    init = compose(
        [str(EXPERIMENT)], ["model.init_args.vlm.init_args.decoder.init_args.zero_init_outputs=false"], "tiny"
    )
    init = init.config["model"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--vlm", type=VisionLanguageModel)
    parser.add_argument("--processor", type=Processor)
    built = parser.instantiate_classes(parser.parse_object({"vlm": init["vlm"], "processor": init["processor"]}))
    built.processor.bind(built.vlm.image_spec, built.vlm.projector.grid)
    built.vlm.bind(built.processor.image_token_id)
    return PretrainStage(built.vlm, built.processor, optimizer or adamw)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)


def train_data(processor: Processor, num_steps: int, long_tailed: bool = False) -> TrainData:
    """The tiny mixture of pre-training (objects of level 0), or every kind of sample above it."""
    init = compose([str(EXPERIMENT)], scale="tiny").config["data"]["init_args"]
    sources = LONG_TAILED if long_tailed else {name: Source(**source) for name, source in init["sources"].items()}
    data = TrainData(str(corpus()), sources, init["seq_len"], num_steps, SAMPLES_PER_STEP)
    data.connect(processor)
    return data


def batches(processor: Processor, num_steps: int, long_tailed: bool = False) -> list[Batch]:
    data = train_data(processor, num_steps, long_tailed)
    data.setup("fit")
    return list(data.train_dataloader())


def num_labels(batch: Batch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())
