"""Weights for the mismatch between the engine that generated a response and the model that is trained on it.

Both hold the same parameters, yet their log-probabilities differ, so that data thought on-policy is not. Truncated
importance sampling (TIS) caps the ratio of the two; the masked variant (MIS) drops what lies outside a band.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .policy_aggregate import sequence_sums

MAX_LOG_RATIO = 20.0  # exp(20) is 4.9e8: far outside any clip, far inside fp32


@dataclass(frozen=True, kw_only=True)
class EngineCorrection:
    """w = pi_old / pi_engine, truncated or masked; it multiplies the policy loss of a token and has no gradient.

    Args:
        cap: largest ratio: 2 to 5 is usual, PaCoRe takes 8.
        floor: smallest ratio; None: none.
        level: token: less variance, but biased. sequence: the product over a response, unbiased.
        mode: truncate: ratios are clamped to [floor, cap]. mask: those outside count 0.
    """

    cap: float = 2.0
    floor: float | None = None
    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"

    def __post_init__(self) -> None:
        if not self.cap > 0 or (self.floor is not None and not 0 <= self.floor <= self.cap):
            raise ValueError(f"correction needs 0 <= floor <= cap and cap > 0, got floor {self.floor}, cap {self.cap}")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"correction.level is {self.level!r}; accepted are token, sequence")
        if self.mode not in ("truncate", "mask"):
            raise ValueError(f"correction.mode is {self.mode!r}; accepted are truncate, mask")

    @torch.no_grad()
    def __call__(self, old_logp: Tensor, engine_logp: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
        """Weights [N]. A token whose engine log-probability is NaN (not told) has the ratio 1."""
        ratio = self.ratio(old_logp, engine_logp, sequence, num_sequences)
        if self.mode == "truncate":
            return ratio.clamp(min=self.floor, max=self.cap)
        return ratio.masked_fill(self.is_outside(ratio), 0.0)

    def ratio(self, old_logp: Tensor, engine_logp: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
        """[N]: the ratio before it is truncated or masked."""
        log_ratio = (old_logp - engine_logp).masked_fill(engine_logp.isnan(), 0.0)  # [N]
        if self.level == "sequence":
            log_ratio = sequence_sums(log_ratio, sequence, num_sequences)[sequence]
        return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def is_outside(self, ratio: Tensor) -> Tensor:
        """[N] bool: True where the ratio is above the cap or below the floor."""
        above = ratio > self.cap
        return above if self.floor is None else above | (ratio < self.floor)
