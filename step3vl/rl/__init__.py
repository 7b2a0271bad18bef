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

__all__ = [
    "GAE",
    "GDPO",
    "Advantages",
    "Estimator",
    "GroupRelative",
    "LeaveOneOut",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "Scored",
    "discounted_sums",
    "gae",
    "gdpo",
    "group_relative",
    "leave_one_out",
    "moments",
    "weighted_reward",
    "whiten",
]
