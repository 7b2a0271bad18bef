"""What an encoder has seen and what it knows: images and FLOPs of its pre-training, and linear probes at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from step3vl.callbacks.throughput import over_ranks
from step3vl.evaluation.probe import Probe, run_probes
from step3vl.models.vision import VisionEncoder
from step3vl.types import IGNORE_INDEX

FILE = "encoder.json"
"""In the run's folder."""


class Upbringing(Callback):
    """Counts images and FLOPs of training, over ranks and restarts; probes the encoder after training and in `test`.

    Both are printed, and written to encoder.json in the run's folder; `step3vl test` also puts them into metrics.json.

    Args:
        probes: what is read from frozen features, by name; none: images and FLOPs alone.
    """

    def __init__(self, probes: dict[str, Probe] | None = None):
        self.probes: Mapping[str, Probe] = probes or {}
        self.cost: Any = None
        self.num_images_seen, self.flops_seen = 0, 0.0
        self.scores: dict[str, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        encoder_of(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vlm: Any = getattr(pl_module, "vlm", None)
        self.cost = None if vlm is None else vlm.flops()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.cost is None:
            counts = [float(batch.num_images), pl_module.training_flops(batch)]  # type: ignore[operator]
        else:
            num_images = 0 if batch.images is None else len(batch.images)
            counts = [float(num_images), self.cost.batch(batch, int((batch.labels != IGNORE_INDEX).sum()))]
        drawn, flops = over_ranks(counts, "SUM", trainer)
        self.num_images_seen, self.flops_seen = self.num_images_seen + int(drawn), self.flops_seen + flops

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report(trainer, pl_module)

    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe on the first rank, print and write."""
        if not trainer.is_global_zero:
            return
        start_s = time.process_time()
        is_sharded = bool(getattr(pl_module, "is_sharded", False))
        if is_sharded and self.probes:
            print("encoder: not probed, because it is sharded; step3vl test on one device probes it")
        self.scores = {} if is_sharded else run_probes(encoder_of(pl_module), self.probes)
        console = Console()
        console.print(
            f"encoder: {self.num_images_seen:,} images seen, {self.flops_seen:.3g} FLOPs (estimated); "
            f"probes took {time.process_time() - start_s:.0f} CPU s",
            highlight=False,
        )
        if self.scores:
            console.print(probe_table(self.scores))
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.facts(), "probes": self.scores}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    def facts(self) -> dict[str, Any]:
        """For the provenance of a score."""
        return {"encoder_images_seen": self.num_images_seen, "encoder_flops": self.flops_seen}

    def state_dict(self) -> dict[str, Any]:
        return {"num_images_seen": self.num_images_seen, "flops_seen": self.flops_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_images_seen, self.flops_seen = int(state_dict["num_images_seen"]), float(state_dict["flops_seen"])


def encoder_of(module: Any) -> VisionEncoder:
    """The vision encoder of a stage, alone or inside of its vision-language model. Raises ValueError without one."""
    encoder = getattr(getattr(module, "vlm", module), "vision_encoder", None)
    if not isinstance(encoder, VisionEncoder):
        raise ValueError(
            f"trainer.callbacks: Upbringing needs a stage with a vision encoder, got {type(module).__name__}"
        )
    return encoder


def probe_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Accuracy of each probe beside an encoder of random weights and the commonest label."""
    table = Table(title="Linear probes on frozen features, held-out images")
    for title in ("property", "accuracy", "95 % interval", "random weights", "majority", "cases"):
        table.add_column(title, justify="left" if title == "property" else "right")
    for name, s in scores.items():
        cells = f"{s['score']:.3f}", f"{s['low']:.3f}..{s['high']:.3f}", f"{s['blind']:.3f}", f"{s['majority']:.3f}"
        table.add_row(name, *cells, str(s["num_cases"]))
    return table
