"""Log-probabilities of chosen tokens, and entropies, without ever holding all logits (reinforcement learning).

They are those of the distribution that answers are drawn from: logits over the temperature, with tokens that are never
said at minus infinity. Logits exist for a chunk of rows at a time and are computed again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in fp32."""


def scaled_logits(rows: Tensor, lm_head: nn.Module, temperature: float = 1.0, banned: int | None = None) -> Tensor:
    """Logits [n,V] in fp32 of hidden states [n,D], divided by the temperature.

    Args:
        rows: hidden states.
        lm_head: hidden states to logits.
        temperature: above 0.
        banned: token that is never said; None: none.
    """
    logits = lm_head(rows).float() / temperature  # [n,V]
    if banned is not None:
        logits = logits.index_fill(-1, torch.tensor([banned], device=logits.device), float("-inf"))
    return logits


def token_logprobs(
    rows: Tensor,
    lm_head: nn.Module,
    labels: Tensor,
    temperature: float = 1.0,
    banned: int | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability [n] of each label, with gradient, and entropy [n] in nats of each distribution, without.

    Args:
        rows: hidden states [n,D].
        lm_head: hidden states to logits.
        labels: [n] long.
        temperature, banned: as in `scaled_logits`.
        chunk_size: rows whose logits exist at a time; None: so many that they take 128 MiB.
    """
    if not len(rows):  # the head has a part in every step, or ranks with and without rows would differ
        return lm_head(rows).sum(-1).float(), rows.new_zeros(0, dtype=torch.float32)

    def chunk(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = scaled_logits(rows, lm_head, temperature, banned)  # [c,V]
        logp = logits - logits.logsumexp(-1, keepdim=True)
        with torch.no_grad():
            entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
        return logp.gather(-1, labels[:, None]).squeeze(-1), entropy

    weight = getattr(lm_head, "weight", None)
    size = chunk_size or max(1, CHUNK_LOGITS // (rows.shape[-1] if weight is None else len(weight)))
    if len(rows) <= size:
        return chunk(rows, labels)
    parts = [
        checkpoint(chunk, *part, use_reentrant=False) if torch.is_grad_enabled() else chunk(*part)
        for part in zip(rows.split(size), labels.split(size))
    ]
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies)
