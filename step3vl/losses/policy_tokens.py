"""The tokens that a policy is trained on: log-probabilities and advantages of sampled responses, packed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .policy_engine import EngineCorrection
from .policy_kl import KL, kl_estimate


@dataclass(kw_only=True)
class PolicyTokens:
    """Tokens of S responses, each response whole. Held in fp32 at least; only `logp` keeps its gradient.

    Log-probabilities are those of the token that was sampled.
    """

    logp: Tensor  # [N], of the policy in training
    advantages: Tensor  # [N]; methods that judge whole responses repeat their value
    sequence: Tensor  # [N] long, the response of each token, 0 to S - 1
    num_sequences: int  # S
    old_logp: Tensor | None = None  # [N], of the policy when the iteration began; None: on-policy, r is 1
    engine_logp: Tensor | None = None  # [N], told by the engine that generated; NaN where it told none
    ref_logp: Tensor | None = None  # [N], of the reference policy

    def __post_init__(self) -> None:
        exact = torch.promote_types(self.logp.dtype, torch.float32)
        for name in (f.name for f in fields(self) if f.name != "num_sequences"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (len(self.sequence),):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, but sequence has {len(self.sequence)} tokens"
                )
            if name == "logp":
                self.logp = tensor.to(exact)
            elif tensor is not None and name != "sequence":
                setattr(self, name, tensor.detach().to(exact))
        if self.old_logp is None:
            self.old_logp = self.logp.detach()

    @property
    def log_ratio(self) -> Tensor:
        """[N]: log r."""
        assert self.old_logp is not None
        return self.logp - self.old_logp

    def engine_weights(self, correction: EngineCorrection) -> Tensor:
        """[N]. ValueError without the engine's log-probabilities."""
        if self.engine_logp is None or self.old_logp is None:
            raise ValueError("objective.correction needs engine_logp, the generating engine's log-probabilities")
        return correction(self.old_logp, self.engine_logp, self.sequence, self.num_sequences)

    def kl(self, estimator: KL = "k3") -> Tensor:
        """[N], to the reference. ValueError without the reference's log-probabilities."""
        if self.ref_logp is None:
            raise ValueError("objective.kl_coef needs ref_logp, the reference policy's log-probabilities")
        return kl_estimate(self.logp, self.ref_logp, estimator)
