"""What to watch while a policy is trained: how far it has moved, how much is clipped, how far the engine is off.

Means come as sums with weights and may be added over micro-batches and ranks; of maxima the largest is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from step3vl.types import WeightedSum

from .policy import PolicyObjective
from .policy_kl import kl_estimate
from .policy_tokens import PolicyTokens


@dataclass(frozen=True, slots=True)
class PolicyStatistics:
    """Scalars, no gradient.

    means:
        ratio: mean r; far from 1 the data is stale.
        approx_kl: KL(old || current) by k3; a sudden rise comes before collapse.
        clip_low, clip_high, clip_fraction: share of tokens held at a bound, and of both together.
        kl: to the reference by k3, where there is one.
        engine_mismatch: |log pi_old - log pi_engine|, over tokens that the engine told.
        engine_kl: KL(engine || old) by k3, over the same.
        engine_weight: mean weight of the correction; engine_capped: share of tokens that it truncated or dropped.
    maxima:
        ratio_max and engine_mismatch_max, 0 for no tokens.
    """

    means: dict[str, WeightedSum]
    maxima: dict[str, Tensor]


@torch.no_grad()
def policy_statistics(tokens: PolicyTokens, objective: PolicyObjective) -> PolicyStatistics:
    """All statistics that the given log-probabilities allow, with the objective's own ratio and bounds."""
    assert tokens.old_logp is not None
    ratio = objective.ratio(tokens)
    low, high = objective.clipped(tokens)
    means = {
        "ratio": _mean(ratio),
        "approx_kl": _mean(kl_estimate(tokens.old_logp, tokens.logp)),
        "clip_low": _mean(low.to(ratio.dtype)),
        "clip_high": _mean(high.to(ratio.dtype)),
        "clip_fraction": _mean((low | high).to(ratio.dtype)),
    }
    maxima = {"ratio_max": _largest(ratio)}
    if tokens.ref_logp is not None:
        means["kl"] = _mean(tokens.kl())
    if tokens.engine_logp is not None:
        told = ~tokens.engine_logp.isnan()
        old, engine = tokens.old_logp[told], tokens.engine_logp[told]
        means["engine_mismatch"] = _mean((old - engine).abs())
        means["engine_kl"] = _mean(kl_estimate(engine, old))
        maxima["engine_mismatch_max"] = _largest((old - engine).abs())
        if objective.correction is not None:
            packed = (tokens.old_logp, tokens.engine_logp, tokens.sequence, tokens.num_sequences)
            means["engine_weight"] = _mean(objective.correction(*packed))
            outside = objective.correction.is_outside(objective.correction.ratio(*packed))
            means["engine_capped"] = _mean(outside.to(ratio.dtype))
    return PolicyStatistics(means, maxima)


def _mean(x: Tensor) -> WeightedSum:
    return WeightedSum(x.sum(), x.new_tensor(float(len(x))))


def _largest(x: Tensor) -> Tensor:
    return x.max() if len(x) else x.new_zeros(())
