"""Who is updated, by which rule, at what rate: parameter groups, Muon + AdamW in one optimizer, schedules."""

from .groups import ParamGroup, build_groups, freeze_parameters
from .muon import MuonAdamW
from .schedule import TwoPhase, WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay

__all__ = [
    "MuonAdamW",
    "ParamGroup",
    "TwoPhase",
    "WarmupConstant",
    "WarmupCosine",
    "WarmupLinear",
    "WarmupStableDecay",
    "build_groups",
    "freeze_parameters",
]
