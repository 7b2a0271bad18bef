"""One LightningModule a stage. It owns the loss, the optimizer and exact normalisation; parts are given."""

from .base import Stage
from .critic import Critic
from .pretrain import PretrainStage
from .rl import RLStage
from .sft import SFTStage

__all__ = ["Critic", "PretrainStage", "RLStage", "SFTStage", "Stage"]
