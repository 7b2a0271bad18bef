"""One line of progress every few seconds, for logs and pipes where a bar cannot be drawn."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

SHOWN = ("loss", "reward", "length", "tokens/s", "mfu", "supervised", "packing")


class ProgressLines(Callback):
    """Prints step, loss, speed and time left.

    Args:
        every_s: seconds between lines.
    """

    def __init__(self, every_s: float = 10.0):
        self.every_s = every_s

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_s = self.last_s = time.monotonic()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        now, step, last = time.monotonic(), trainer.global_step, trainer.max_steps
        if now - self.last_s < self.every_s and step != last:
            return
        self.last_s = now
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        left_s = (now - self.start_s) / max(1, step - self.first_step) * max(0, last - step)
        shown = "  ".join(f"{k} {values[k]:.3g}" for k in SHOWN if k in values)
        pl_module.print(f"step {step}/{last}  {shown}  left {int(left_s // 60)}:{int(left_s % 60):02d}")
