"""What every stage has, with a language model or without: steps that are refused."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule

from .guard import Guard, rewind


class Trained(LightningModule):
    """Base of `Stage`, which trains a vision-language model, and of `EncoderStage`, which trains an encoder alone."""

    guard: Guard
    step_ids: list[str]
    """Samples of the step in progress."""

    def refuse_or_go(self, loss: float, norm: float, is_finite: bool) -> None:
        """Ask the guard; loss and norm are those of all ranks, so that all of them refuse together."""
        reason = self.guard.judge(loss, norm)
        self.log("refused", float(self.guard.num_refused))
        if reason is None:
            return
        for parameter in self.parameters():
            parameter.grad = None
        if self.trainer.is_global_zero:
            print(f"step {self.global_step} refused: {reason}; weights and moments stay as they were")
        if not is_finite or math.isfinite(loss):  # the rank where it began, or all where no rank can tell
            print(f"samples of that step on rank {self.global_rank}: {', '.join(self.step_ids)}")
        if self.guard.is_over:
            rewind(self.guard, self.trainer)
        self.guard.check()
