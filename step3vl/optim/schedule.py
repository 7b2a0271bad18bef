"""Learning-rate schedules, one multiplier a step; every group keeps its own peak rate.

All warm up linearly. `TwoPhase` is the report's pre-training in one run: 5e-5 -> 1e-5 -> 6e-6.
"""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SHAPES = ("cosine", "linear")


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a half cosine down to `min_lr_ratio` of the peak at `total_steps`.

    Args:
        optimizer: given by the stage.
        total_steps: optimizer steps of the run.
        warmup_steps: steps from 0 to the peak.
        min_lr_ratio: floor as a share of the peak.
    """

    shape = "cosine"

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_lr_ratio: float = 0.0):
        _check(total_steps, warmup_steps, min_lr_ratio=min_lr_ratio)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return _descend(step, warmup_steps, total_steps, 1.0, min_lr_ratio, self.shape)

        super().__init__(optimizer, factor)


class WarmupLinear(WarmupCosine):
    """As WarmupCosine, with a straight line in place of the half cosine."""

    shape = "linear"


class WarmupConstant(LambdaLR):
    """Linear warm-up, then the peak for as long as the run lasts.

    Args:
        optimizer: given by the stage.
        warmup_steps: steps from 0 to the peak.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0):
        _check(1, warmup_steps)
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


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
        _check(total_steps, warmup_steps, decay_share=decay_share, min_lr_ratio=min_lr_ratio)
        start = max(warmup_steps, round(total_steps * (1 - decay_share)))

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return _descend(step, start, total_steps, 1.0, min_lr_ratio, "linear")

        super().__init__(optimizer, factor)


class TwoPhase(LambdaLR):
    """Linear warm-up, phase 1 down to `mid_lr_ratio` of the peak, phase 2 on to `min_lr_ratio` at `total_steps`.

    The same rates as two runs, one a phase, of which the second starts at the first one's last rate.

    Args:
        optimizer: given by the stage.
        total_steps: optimizer steps of both phases.
        warmup_steps: steps from 0 to the peak; they belong to phase 1.
        phase_1_share: share of the steps that is phase 1, above 0 and below 1.
        mid_lr_ratio: rate between the phases as a share of the peak.
        min_lr_ratio: rate at the end as a share of the peak.
        shape: how each phase descends, cosine (half a wave a phase) or linear.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        phase_1_share: float = 0.75,
        mid_lr_ratio: float = 0.2,
        min_lr_ratio: float = 0.12,
        shape: Literal["cosine", "linear"] = "cosine",
    ):
        _check(total_steps, warmup_steps, phase_1_share=phase_1_share, mid_lr_ratio=mid_lr_ratio)
        _check(total_steps, warmup_steps, min_lr_ratio=min_lr_ratio)
        if shape not in SHAPES:
            raise ValueError(f"shape must be {' or '.join(SHAPES)}, got {shape!r}")
        middle = round(total_steps * phase_1_share)
        if not 0 < phase_1_share < 1 or (warmup_steps > middle and total_steps > warmup_steps):
            raise ValueError(
                f"phase 1 must hold the warm-up and leave steps to phase 2; phase_1_share {phase_1_share} of "
                f"{total_steps} steps is {middle}, with {warmup_steps} of warm-up"
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if step < middle:
                return _descend(step, warmup_steps, middle, 1.0, mid_lr_ratio, shape)
            return _descend(step, max(middle, warmup_steps), total_steps, mid_lr_ratio, min_lr_ratio, shape)

        super().__init__(optimizer, factor)


def _descend(step: int, start: int, stop: int, high: float, low: float, shape: str) -> float:
    """`high` until `start`, `low` from `stop` on, and the shape between."""
    done = min(1.0, max(0.0, (step - start) / max(1, stop - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done
    return low + (high - low) * left


def _check(total_steps: int, warmup_steps: int, **shares: float) -> None:
    if total_steps < 1 or warmup_steps < 0:  # a run cut short may end inside its warm-up
        raise ValueError(
            f"a schedule needs total_steps >= 1 and warmup_steps >= 0, got {total_steps} and {warmup_steps}"
        )
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {share}")
