"""One LightningModule a stage. It owns the loss, the optimizer and exact normalisation; parts are given."""

from .base import Stage
from .contrastive import ContrastiveStage
from .critic import Critic
from .encoder import EncoderStage
from .pacore import PaCoReStage
from .pretrain import PretrainStage
from .reward_model import RewardModelStage
from .rl import RLStage
from .rl_refresh import Refresh
from .self_distillation import SelfDistillationStage
from .sft import SFTStage
from .trained import Trained

__all__ = [
    "ContrastiveStage",
    "Critic",
    "EncoderStage",
    "PaCoReStage",
    "PretrainStage",
    "RLStage",
    "Refresh",
    "RewardModelStage",
    "SFTStage",
    "SelfDistillationStage",
    "Stage",
    "Trained",
]
