"""One LightningModule a stage. It owns the loss, the optimizer and exact normalisation; parts are given."""

from .base import Stage
from .critic import Critic
from .pacore import PaCoReStage
from .pretrain import PretrainStage
from .rl import RLStage
from .sft import SFTStage

__all__ = ["Critic", "PaCoReStage", "PretrainStage", "RLStage", "SFTStage", "Stage"]
