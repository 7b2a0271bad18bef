"""Next-token cross-entropy over weighted tokens, without ever holding all logits (every supervised stage).

Rows without a label are dropped before the language-model head, because image, prompt and padding rows teach nothing.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from step3vl.types import IGNORE_INDEX, Batch, WeightedSum

from .liger import is_installed, liger_cross_entropy, why_not
from .linear import linear_cross_entropy


class CrossEntropy:
    """Sum of weight x negative log-likelihood over labelled tokens, in fp32.

    Args:
        chunk_size: supervised tokens whose logits exist at a time; null: as many as make the logits of a chunk as large
            as the head's weights, which costs little memory and no time.
        z_loss: factor of log(Z)^2, which keeps logits from drifting; 0 is off.
        kernel: chunked: ours, anywhere. liger: Liger's, on a GPU with the package liger-kernel; a batch whose tokens
            differ in weight goes to ours, which is said once. auto: liger where it can be had, else chunked.
    """

    def __init__(
        self,
        chunk_size: int | None = None,
        z_loss: float = 0.0,
        kernel: Literal["auto", "chunked", "liger"] = "auto",
    ):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
        if z_loss < 0:
            raise ValueError(f"z_loss must be at least 0, got {z_loss}")
        if kernel not in ("auto", "chunked", "liger"):
            raise ValueError(f"kernel must be auto, chunked or liger, got {kernel!r}")
        if kernel == "liger" and not is_installed():
            raise ValueError("kernel: liger needs the package liger-kernel, which is not installed; auto does without")
        self.chunk_size, self.z_loss, self.kernel = chunk_size, z_loss, kernel
        self._said: set[str] = set()

    def __call__(self, hidden: Tensor, lm_head: nn.Module, batch: Batch) -> WeightedSum:
        """hidden [B,T,D] -> WeightedSum of scalars; a batch without labels gives a zero that still has a gradient."""
        keep = (batch.labels != IGNORE_INDEX).flatten().nonzero().squeeze(-1)  # [n]
        rows = hidden.flatten(0, 1)
        rows = rows if len(keep) == len(rows) else rows.index_select(0, keep)  # [n,D]
        labels = batch.labels.flatten()[keep]  # [n]
        weights = batch.loss_weights.flatten()[keep].float()  # [n]
        return WeightedSum(self._sum(rows, labels, weights, lm_head), weights.sum())

    def _sum(self, rows: Tensor, labels: Tensor, weights: Tensor, lm_head: nn.Module) -> Tensor:
        if any(isinstance(parameter, DTensor) for parameter in lm_head.parameters()):
            raise ValueError(
                "lm_head is sharded while the loss needs all of it: shard it with the root of the model, as "
                "step3vl.parallel.shard does, not as a unit of its own, and call the model before the loss"
            )
        plain = lm_head if isinstance(lm_head, nn.Linear) and _is_plain(lm_head) else None
        if self._wants_liger(rows.device) and len(rows):
            reason = why_not(rows, weights) if plain else "the head is more than a linear layer"
            if plain and reason is None:
                return liger_cross_entropy(rows, plain.weight, plain.bias, labels, weights, self.z_loss)
            self._say_once(str(reason))
        if plain is None:
            return self._sum_by_calls(rows, labels, weights, lm_head)
        return linear_cross_entropy(rows, plain.weight, plain.bias, labels, weights, self.z_loss, self.chunk_size)

    def _wants_liger(self, device: torch.device) -> bool:
        if self.kernel == "liger" and device.type != "cuda":
            raise ValueError(f"kernel: liger needs a GPU, but the model is on {device.type}; auto does without")
        return self.kernel == "liger" or (self.kernel == "auto" and device.type == "cuda" and is_installed())

    def _say_once(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"cross-entropy: Liger's kernel does not apply here: {reason}; using ours", stacklevel=4)

    def _sum_by_calls(self, rows: Tensor, labels: Tensor, weights: Tensor, lm_head: nn.Module) -> Tensor:
        """For a head that must be called (an adapter, a hook); backward computes logits again."""

        def chunk_sum(rows: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
            logits = lm_head(rows).float()  # [n,V]
            losses = F.cross_entropy(logits, labels, reduction="none")  # [n]
            if self.z_loss:
                losses = losses + self.z_loss * logits.logsumexp(-1).square()
            return (losses * weights).sum()

        size = self.chunk_size or max(1, rows.shape[-1])
        parts = zip(*(t.split(size) for t in (rows, labels, weights)))
        return torch.stack([checkpoint(chunk_sum, *part, use_reentrant=False) for part in parts]).sum()


def _is_plain(layer: nn.Linear) -> bool:
    """Whether calling the layer does no more than rows @ weight.T + bias."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer).forward is nn.Linear.forward and not any(hooks)
