"""Callbacks that break a step, and only what they say: on one rank, in some steps."""

import math

from lightning.pytorch import Callback


class Poison(Callback):
    """On rank 1, the loss of some steps is not a number, and the gradient of others is infinite.

    Args:
        losses: optimizer steps, counted from 0, whose loss is spoilt.
        gradients: those whose gradient is.
    """

    def __init__(self, losses: list[int], gradients: list[int]):
        self.losses, self.gradients = losses, gradients

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step in self.losses:
            clean = type(pl_module).losses

            def spoilt(batch):
                del pl_module.losses
                return {
                    name: loss._replace(value=loss.value * math.nan) for name, loss in clean(pl_module, batch).items()
                }

            pl_module.losses = spoilt

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == 1 and trainer.global_step in self.gradients:
            loss.register_hook(lambda gradient: gradient * math.inf)
