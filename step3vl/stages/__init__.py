"""One LightningModule a stage. It owns the loss, the optimizer and exact normalisation; parts are given."""

from .base import Stage
from .pretrain import PretrainStage
from .sft import SFTStage

__all__ = ["PretrainStage", "SFTStage", "Stage"]
