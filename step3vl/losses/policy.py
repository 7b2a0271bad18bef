"""Objectives of reinforcement learning on sampled responses: PPO, GRPO and kin, GSPO, SAPO, CISPO, REINFORCE.

They see response tokens only, packed: no padding and no mask. With r = pi / pi_old and advantage A, each says what a
token's loss is; how tokens are averaged, the KL penalty and the correction for the engine are the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from step3vl.types import WeightedSum

from .policy_aggregate import Aggregation, Totals, aggregate, check_aggregation, sequence_means, sequence_sums
from .policy_engine import MAX_LOG_RATIO, EngineCorrection
from .policy_kl import KL
from .policy_tokens import PolicyTokens


class PolicyObjective(Protocol):
    """What an experiment file may name as its objective; all below are such."""

    @property
    def correction(self) -> EngineCorrection | None: ...
    def __call__(self, tokens: PolicyTokens, totals: Totals | None = None) -> WeightedSum: ...
    def ratio(self, tokens: PolicyTokens) -> Tensor: ...
    def clipped(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What all objectives share; a subclass gives `token_losses`.

    Args:
        aggregation: how tokens are averaged (`aggregate`).
        max_length: tokens, the constant of seq-mean-token-sum-norm.
        correction: weights for the mismatch with the generating engine; None: none.
        kl_coef: factor of the estimated KL divergence to the reference, which is averaged as the policy loss is.
        kl_estimator: k1 | k2 | k3.
        kl_times_ratio: multiply it by r, which makes the estimate one for the policy in training.
    """

    aggregation: Aggregation = "token-mean"
    max_length: int | None = None
    correction: EngineCorrection | None = None
    kl_coef: float = 0.0
    kl_estimator: KL = "k3"
    kl_times_ratio: bool = False

    def __post_init__(self) -> None:
        check_aggregation(self.aggregation, self.max_length)
        if self.kl_coef < 0:
            raise ValueError(f"objective.kl_coef must be at least 0, got {self.kl_coef}")

    def __call__(self, tokens: PolicyTokens, totals: Totals | None = None) -> WeightedSum:
        """The loss of a micro-batch; summed over a step's micro-batches and ranks, value / weight is the loss."""
        losses = self.token_losses(tokens)
        if self.correction is not None:
            losses = losses * tokens.engine_weights(self.correction)
        if self.kl_coef:
            kl = tokens.kl(self.kl_estimator)
            losses = losses + self.kl_coef * (kl * self.ratio(tokens) if self.kl_times_ratio else kl)
        return aggregate(losses, tokens.sequence, tokens.num_sequences, self.aggregation, totals, self.max_length)

    def token_losses(self, tokens: PolicyTokens) -> Tensor:
        """[N]"""
        raise TypeError(f"{type(self).__name__} must define token_losses(tokens)")

    def ratio(self, tokens: PolicyTokens) -> Tensor:
        """[N]: r, its logarithm clamped to +-20; beyond that it has no gradient."""
        return tokens.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def clipped(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        """[N] bool each: True where the objective holds r at its lower, at its upper bound."""
        none = torch.zeros_like(tokens.sequence, dtype=torch.bool)
        return none, none


@dataclass(frozen=True, kw_only=True)
class PPOClip(Objective):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, eq. 7).

    Args:
        clip_low, clip_high: distances of the bounds from 1.
        dual_clip: largest r that counts where A is negative; None: no such bound.
        ratio_level: token. sequence-mean: the geometric mean of r over the response (GSPO). sequence-product: their
            product, the ratio of the whole response (RLOO).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio_level: Literal["token", "sequence-mean", "sequence-product"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(f"clip_low must be in 0..1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high}, got {self.dual_clip}")
        if self.ratio_level not in ("token", "sequence-mean", "sequence-product"):
            raise ValueError(
                f"ratio_level is {self.ratio_level!r}; accepted are token, sequence-mean, sequence-product"
            )

    def ratio(self, tokens: PolicyTokens) -> Tensor:
        if self.ratio_level == "token":
            return super().ratio(tokens)
        reduce = sequence_means if self.ratio_level == "sequence-mean" else sequence_sums
        log_ratio = reduce(tokens.log_ratio, tokens.sequence, tokens.num_sequences)  # [S]
        return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[tokens.sequence]

    def token_losses(self, tokens: PolicyTokens) -> Tensor:
        ratio, advantages = self.ratio(tokens), tokens.advantages
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.dual_clip is not None:
            ratio = ratio.clamp(max=self.dual_clip)
        return -torch.minimum(ratio * advantages, bounded * advantages)

    def clipped(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        ratio, advantages = self.ratio(tokens), tokens.advantages
        low = (ratio < 1 - self.clip_low) & (advantages < 0)
        high = (ratio > 1 + self.clip_high) & (advantages > 0)
        return low, high if self.dual_clip is None else high | ((ratio > self.dual_clip) & (advantages < 0))


@dataclass(frozen=True, kw_only=True)
class GRPO(PPOClip):
    """PPOClip with every response counting the same, whatever its length (DeepSeekMath, eq. 3)."""

    aggregation: Aggregation = "seq-mean-token-mean"


@dataclass(frozen=True, kw_only=True)
class DrGRPO(PPOClip):
    """PPOClip divided by a constant length, so that long wrong answers are not favoured (Dr.GRPO).

    max_length must be given: the number of tokens that may be generated.
    """

    aggregation: Aggregation = "seq-mean-token-sum-norm"


@dataclass(frozen=True, kw_only=True)
class DAPO(PPOClip):
    """PPOClip over all tokens of the batch with a higher upper bound (DAPO, eq. 8)."""

    clip_high: float = 0.28


@dataclass(frozen=True, kw_only=True)
class GSPO(PPOClip):
    """PPOClip on the length-normalised ratio of the response (GSPO, eq. 5); its bounds are far tighter."""

    aggregation: Aggregation = "seq-mean-token-mean"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    ratio_level: Literal["token", "sequence-mean", "sequence-product"] = "sequence-mean"


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """-(4 / tau) sigmoid(tau (r - 1)) A: a soft gate in place of the clip (SAPO); its slope at r = 1 is that of PPO.

    Args:
        tau_positive: temperature where A > 0.
        tau_negative: elsewhere; higher, so that the gate closes faster where tokens are pushed down.
    """

    aggregation: Aggregation = "seq-mean-token-mean"
    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_positive <= 0 or self.tau_negative <= 0:
            raise ValueError(f"tau must be positive, got {self.tau_positive} and {self.tau_negative}")

    def token_losses(self, tokens: PolicyTokens) -> Tensor:
        advantages = tokens.advantages
        positive, negative = advantages.new_tensor([self.tau_positive, self.tau_negative])
        tau = torch.where(advantages > 0, positive, negative)  # [N]
        return -(4 / tau) * torch.sigmoid(tau * (self.ratio(tokens) - 1)) * advantages


@dataclass(frozen=True, kw_only=True)
class CISPO(Objective):
    """-min(r, max_ratio) A log pi, no gradient through r: a capped weight in place of a clip (MiniMax-M1, eq. 4)."""

    max_ratio: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_ratio <= 0:
            raise ValueError(f"max_ratio must be positive, got {self.max_ratio}")

    def token_losses(self, tokens: PolicyTokens) -> Tensor:
        return -self.ratio(tokens).detach().clamp(max=self.max_ratio) * tokens.advantages * tokens.logp

    def clipped(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        high = self.ratio(tokens) > self.max_ratio
        return torch.zeros_like(high), high


@dataclass(frozen=True, kw_only=True)
class Reinforce(Objective):
    """-A log pi, without a ratio (PaCoRe's RLVR stage, with a correction for the engine)."""

    def token_losses(self, tokens: PolicyTokens) -> Tensor:
        return -tokens.advantages * tokens.logp
