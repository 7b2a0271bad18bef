"""Estimates of KL(policy || reference) from sampled tokens, and the entropy of a policy from its logits.

The three estimators of the KL divergence differ in bias, variance and, used as a loss, in their gradient: k1 is
unbiased, but its gradient is zero on average; k2 has the gradient of the KL divergence; k3 is unbiased and positive.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .policy_engine import MAX_LOG_RATIO

KL = Literal["k1", "k2", "k3"]
CHUNK_LOGITS = 2**24  # in fp32 at a time


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KL = "k3") -> Tensor:
    """[N], one estimate a token; log-ratios are clamped to +-20, which keeps k3 finite.

    With d = log ref - log pi: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
    """
    if estimator not in get_args(KL):
        raise ValueError(f"KL estimator is {estimator!r}; accepted are {', '.join(get_args(KL))}")
    d = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else d.expm1() - d


def entropy_from_logits(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """Entropy in nats, in fp32 (fp64 if logits are), with gradient; a logit of -inf is a token that cannot be.

    Args:
        logits: [..., V].
        chunk_size: rows whose probabilities exist at a time, in backward too; None: as many as fit in 64 MiB.

    Returns:
        [...].
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}")
    rows = logits.flatten(0, -2)  # [n,V]
    chunk_size = chunk_size or max(1, CHUNK_LOGITS // rows.shape[-1])
    chunks = rows.split(chunk_size)
    parts = [checkpoint(_entropy, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(parts).view(logits.shape[:-1])


def _entropy(logits: Tensor) -> Tensor:
    """[n] of logits [n,V]."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    logp = logits.to(exact).log_softmax(-1)  # [n,V]
    return -(logp.exp() * logp.clamp_min(torch.finfo(exact).min)).sum(-1)  # the clamp makes 0 x -inf a zero
