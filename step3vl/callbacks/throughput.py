"""Speed and waste, logged every step."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from step3vl.types import IGNORE_INDEX, Batch


class Throughput(Callback):
    """Logs, averaged since the last log:

    tokens/s: tokens of samples (padding excluded) through the model, over wall time including data and logging.
    supervised: share of those tokens that carry a label. Under 5 % most compute teaches nothing.
    packing: share of token slots that hold a sample. Under 0.9 the rows are too long or the samples too few.
    images/s: views (crops and global views) through the encoder.
    cpu_s: process CPU seconds since the start of the run; on shared machines the honest clock.
    tokens: tokens of samples since the start of the run.
    """

    def __init__(self, every_n_steps: int = 10):
        self.every_n_steps = every_n_steps
        self.num_tokens_seen = 0
        self.num_images_seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reset()
        self.cpu_start_s = time.process_time()

    def reset(self) -> None:
        self.start_s = time.perf_counter()
        self.num_slots = self.num_tokens = self.num_labels = self.num_views = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        num_tokens, num_views = batch.input_ids.numel() - batch.num_padding, len(batch.images) if batch.images else 0
        self.num_slots += batch.input_ids.numel()
        self.num_tokens += num_tokens
        self.num_labels += int((batch.labels != IGNORE_INDEX).sum())
        self.num_views += num_views
        self.num_tokens_seen += num_tokens
        self.num_images_seen += num_views
        if trainer.global_step % self.every_n_steps:
            return
        seconds = max(time.perf_counter() - self.start_s, 1e-9)
        pl_module.log("tokens/s", self.num_tokens / seconds, prog_bar=True)
        pl_module.log("supervised", self.num_labels / max(1, self.num_tokens), prog_bar=True)
        pl_module.log("packing", self.num_tokens / max(1, self.num_slots), prog_bar=True)
        pl_module.log("images/s", self.num_views / seconds)
        pl_module.log("cpu_s", time.process_time() - self.cpu_start_s)
        pl_module.log("tokens", float(self.num_tokens_seen))
        self.reset()

    def state_dict(self) -> dict[str, int]:
        return {"num_tokens_seen": self.num_tokens_seen, "num_images_seen": self.num_images_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.num_tokens_seen, self.num_images_seen = state_dict["num_tokens_seen"], state_dict["num_images_seen"]
