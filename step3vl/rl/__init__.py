"""From rewards to advantages: what reinforcement learning does between scoring responses and training on them."""

from .advantage import discounted_sums, gae, gdpo, group_relative, leave_one_out, moments, weighted_reward, whiten
from .estimators import (
    GAE,
    GDPO,
    Advantages,
    Estimator,
    GroupRelative,
    LeaveOneOut,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    Scored,
)
from .filters import Filter, SameReward, TooEasy, TooLong

__all__ = [
    "GAE",
    "GDPO",
    "Advantages",
    "Estimator",
    "Filter",
    "GroupRelative",
    "LeaveOneOut",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "SameReward",
    "Scored",
    "TooEasy",
    "TooLong",
    "discounted_sums",
    "gae",
    "gdpo",
    "group_relative",
    "leave_one_out",
    "moments",
    "weighted_reward",
    "whiten",
]
