"""Learning-rate schedules, one multiplier a step; every group keeps its own peak rate."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a half cosine down to `min_lr_ratio` of the peak at `total_steps`.

    Args:
        optimizer: given by the stage.
        total_steps: optimizer steps of the run.
        warmup_steps: steps from 0 to the peak.
        min_lr_ratio: floor as a share of the peak.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.0):
        _check(total_steps, warmup_steps, min_lr_ratio)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)


class WarmupStableDecay(LambdaLR):
    """Linear warm-up, a flat middle, and a linear decay to `min_lr_ratio` over the last `decay_share` of the run.

    Args:
        optimizer: given by the stage.
        total_steps: optimizer steps of the run.
        warmup_steps: steps from 0 to the peak.
        decay_share: share of the run that decays, 0 to 1.
        min_lr_ratio: floor as a share of the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        decay_share: float = 0.2,
        min_lr_ratio: float = 0.0,
    ):
        _check(total_steps, warmup_steps, min_lr_ratio)
        if not 0 <= decay_share <= 1:
            raise ValueError(f"decay_share must lie in 0..1, got {decay_share}")
        start = max(warmup_steps, round(total_steps * (1 - decay_share)))

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if step < start:
                return 1.0
            left = 1 - min(1.0, (step - start) / max(1, total_steps - start))
            return min_lr_ratio + (1 - min_lr_ratio) * left

        super().__init__(optimizer, factor)


def _check(total_steps: int, warmup_steps: int, min_lr_ratio: float) -> None:
    if total_steps < 1 or warmup_steps < 0:  # a run cut short may end inside its warm-up
        raise ValueError(
            f"a schedule needs total_steps >= 1 and warmup_steps >= 0, got {total_steps} and {warmup_steps}"
        )
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio must lie in 0..1, got {min_lr_ratio}")
