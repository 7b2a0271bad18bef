"""One LightningModule a stage. It owns the loss, the optimizer and exact normalisation; parts are given."""

from .base import Stage
from .pretrain import PretrainStage

__all__ = ["PretrainStage", "Stage"]
