"""The critic's loss and how well it explains returns (PPO as in Open-Reasoner-Zero)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from step3vl.types import WeightedSum

from .policy_aggregate import Totals


@dataclass(frozen=True, kw_only=True)
class ClippedValue:
    """0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), the mean over tokens.

    Args:
        clip: how far a value may move from the one at the start of the iteration and still be pulled towards R; None:
            any distance.
    """

    clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive or null, got {self.clip}")

    def __call__(
        self, values: Tensor, old_values: Tensor, returns: Tensor, totals: Totals | None = None
    ) -> WeightedSum:
        """All [N], one a token, computed in fp32 at least. A token whose return is NaN (cannot be judged) teaches
        nothing. With `totals` both sum and weight are divided by its num_tokens, as in `aggregate`; it must then leave
        out such tokens too."""
        if not values.shape == old_values.shape == returns.shape:
            shapes = ", ".join(str(tuple(t.shape)) for t in (values, old_values, returns))
            raise ValueError(f"values, old_values and returns must have one shape, got {shapes}")
        exact = torch.promote_types(values.dtype, torch.float32)
        judged = ~returns.isnan()
        values, old_values, returns = (t[judged].to(exact) for t in (values, old_values.detach(), returns.detach()))
        losses = (values - returns).square()  # [n]
        if self.clip is not None:
            near = old_values + (values - old_values).clamp(-self.clip, self.clip)
            losses = torch.maximum(losses, (near - returns).square())
        value, weight = losses.sum() / 2, losses.new_tensor(float(len(losses)))
        total = 1.0 if totals is None else totals.num_tokens
        return WeightedSum(value / total, weight / total)


@torch.no_grad()
def value_sums(values: Tensor, returns: Tensor) -> Tensor:
    """[5] fp64, for `explained_variance`: sums over tokens with a return, to be added over micro-batches and ranks."""
    judged = ~returns.isnan()
    returns, errors = returns[judged].double(), (returns - values)[judged].double()
    count = returns.new_tensor(float(len(returns)))
    return torch.stack([count, returns.sum(), returns.square().sum(), errors.sum(), errors.square().sum()])


def explained_variance(sums: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 is no better than a constant; NaN where R does not vary."""
    count, total, squares, error, error_squares = sums.tolist()
    if count == 0:
        return float("nan")
    variance = squares / count - (total / count) ** 2
    if variance <= 1e-12 * squares / count:
        return float("nan")
    return 1 - (error_squares / count - (error / count) ** 2) / variance
