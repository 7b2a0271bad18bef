"""Learning a reward from pairs: the Bradley-Terry loss of a reward model, its accuracy and its margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from step3vl.types import WeightedSum


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """-log sigmoid(chosen - rejected - margin), the mean over pairs, in fp32 at least.

    Args:
        center_coef: factor of (chosen + rejected)^2, which keeps scores around 0; the loss itself does not see a shift.
    """

    center_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.center_coef < 0:
            raise ValueError(f"center_coef must be at least 0, got {self.center_coef}")

    def __call__(
        self, chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, weights: Tensor | None = None
    ) -> WeightedSum:
        """All [P], one a pair: scores, by how much they should differ (None: 0), how much a pair counts (None: 1)."""
        chosen, rejected = _exact(chosen, rejected)
        gap = chosen - rejected if margins is None else chosen - rejected - margins
        losses = F.softplus(-gap)  # [P]
        if self.center_coef:
            losses = losses + self.center_coef * (chosen + rejected).square()
        weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        return WeightedSum((losses * weights).sum(), weights.sum())


@torch.no_grad()
def preference_accuracy(chosen: Tensor, rejected: Tensor) -> WeightedSum:
    """Share of pairs [P] whose chosen answer scores higher; a tie counts one half."""
    chosen, rejected = _exact(chosen, rejected)
    right = ((chosen - rejected).sign() + 1) / 2
    return WeightedSum(right.sum(), right.new_tensor(float(len(right))))


@torch.no_grad()
def preference_margin(chosen: Tensor, rejected: Tensor) -> WeightedSum:
    """Mean of chosen - rejected over pairs [P]."""
    chosen, rejected = _exact(chosen, rejected)
    return WeightedSum((chosen - rejected).sum(), chosen.new_tensor(float(len(chosen))))


def _exact(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        shapes = f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        raise ValueError(f"chosen and rejected must be scores of as many pairs, one axis each, got {shapes}")
    exact = torch.promote_types(chosen.dtype, torch.float32)
    return chosen.to(exact), rejected.to(exact)
