"""Next-token cross-entropy over weighted tokens, without ever holding all logits (every supervised stage).

Rows without a label are dropped before the language-model head, because image, prompt and padding rows teach nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from step3vl.types import IGNORE_INDEX, Batch, WeightedSum


class CrossEntropy:
    """Sum of weight x negative log-likelihood over labelled tokens, in fp32.

    Args:
        chunk_size: supervised tokens whose logits exist at a time; more than one chunk is recomputed in backward.
        z_loss: factor of log(Z)^2, which keeps logits from drifting; 0 is off.
    """

    def __init__(self, chunk_size: int = 4096, z_loss: float = 0.0):
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
        self.chunk_size, self.z_loss = chunk_size, z_loss

    def __call__(self, hidden: Tensor, lm_head: nn.Module, batch: Batch) -> WeightedSum:
        """hidden [B,T,D] -> WeightedSum of scalars; a batch without labels gives a zero that still has a gradient."""
        keep = batch.labels != IGNORE_INDEX  # [B,T]
        rows, labels = hidden[keep], batch.labels[keep]  # [n,D], [n]
        weights = batch.loss_weights[keep].float()  # [n]
        if len(labels) <= self.chunk_size:
            return WeightedSum(self._chunk(rows, labels, weights, lm_head), weights.sum())
        parts = zip(*(t.split(self.chunk_size) for t in (rows, labels, weights)))
        sums = [checkpoint(self._chunk, r, y, w, lm_head, use_reentrant=False) for r, y, w in parts]
        return WeightedSum(torch.stack(sums).sum(), weights.sum())

    def _chunk(self, rows: Tensor, labels: Tensor, weights: Tensor, lm_head: nn.Module) -> Tensor:
        logits = lm_head(rows).float()  # [n,V]
        nll = F.cross_entropy(logits, labels, reduction="none")  # [n]
        if self.z_loss:
            nll = nll + self.z_loss * logits.logsumexp(-1).square()
        return (nll * weights).sum()
