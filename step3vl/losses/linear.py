"""Cross-entropy of a linear layer's outputs, without ever holding all of them (every supervised stage).

Logits exist for one chunk of rows at a time, and their gradient is formed while they are there: backward only scales
what forward left behind, so nothing is computed twice. Sums are taken in fp32 whatever the weights' format is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SMALL_CHUNK = 2**22  # logits; below this a chunk's fixed costs show
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # fp32 logits in work at a time: a cache's worth, or a kernel's


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over rows of weights x (log Z - logit of the label + z_loss x (log Z)^2); logits = rows @ weight.T + bias.

    Matrix products run in the autocast format, or else in the format of `weight`. The gradient reaches rows, weight and
    bias, once: it can be neither taken twice from one forward nor differentiated again (RuntimeError).

    Args:
        rows: [n,D].
        weight, bias: of the linear layer, [V,D] and [V].
        labels: [n] long, 0 to V - 1.
        weights: [n] float.
        z_loss: factor of (log Z)^2.
        chunk_size: rows whose logits exist at a time; None: as many as make the logits as large as `weight`.

    Returns:
        A scalar in fp32 (fp64 if weight is).
    """
    is_trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weight, bias))
    chunk_size = chunk_size or max(weight.shape[1], SMALL_CHUNK // len(weight))
    return _LinearCrossEntropy.apply(rows, weight, bias, labels, weights, z_loss, chunk_size, is_trained)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        z_loss: float,
        chunk_size: int,
        is_trained: bool,
    ) -> Tensor:
        needs = [is_trained and need for need in ctx.needs_input_grad[:3]]
        ctx.formats = [rows.dtype, weight.dtype, bias.dtype if bias is not None else None]
        device = rows.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            value, ctx.gradients = _sum_and_gradients(
                rows.to(low), weight.to(low), bias, labels, weights, z_loss, chunk_size, needs
            )
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross-entropy keeps no graph of its gradient, so create_graph=True is not possible; "
                "for second derivatives apply torch.nn.functional.cross_entropy to the logits"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "cross-entropy hands out its gradient once, so a second backward is not possible; call the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        (factor,) = upstream
        if factor.device.type != "cpu" or factor != 1:  # elsewhere asking would wait for the device
            gradients = [gradient if gradient is None else gradient.mul_(factor) for gradient in gradients]
        formats = ctx.formats
        return (*(g if g is None else g.to(dtype) for g, dtype in zip(gradients, formats)), *[None] * 5)


def _sum_and_gradients(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    z_loss: float,
    chunk_size: int,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum, and its gradients by rows, weight and bias where they are needed."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    num_rows, num_chunks = len(rows), math.ceil(len(rows) / chunk_size)
    logits = weight.new_empty(min(chunk_size, num_rows), len(weight))  # [c,V], used again by every chunk
    losses = rows.new_empty(num_rows, dtype=exact)  # [n]
    by_rows = torch.empty_like(rows) if needs[0] else None  # [n,D]
    by_weight = torch.zeros_like(weight, dtype=exact if num_chunks > 1 else None) if needs[1] else None  # [V,D]
    by_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs[2] else None  # [V]
    product = torch.empty_like(weight) if by_weight is not None and by_weight.dtype != weight.dtype else None  # [V,D]
    for start in range(0, num_rows, chunk_size):
        part = slice(start, start + chunk_size)
        chunk = torch.mm(rows[part], weight.T, out=logits[: min(chunk_size, num_rows - start)])
        losses[part] = _differentiate(
            chunk, bias, labels[part], weights[part].to(exact), z_loss, any(needs), by_bias, exact
        )
        if by_rows is not None:
            torch.mm(chunk, weight, out=by_rows[part])
        if product is not None and by_weight is not None:  # 16-bit products, summed in fp32
            by_weight += torch.mm(chunk.T, rows[part], out=product)
        elif by_weight is not None:
            by_weight.addmm_(chunk.T, rows[part])
    return losses.sum(), [by_rows, by_weight, by_bias]


def _differentiate(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    z_loss: float,
    needs_gradient: bool,
    by_bias: Tensor | None,
    exact: torch.dtype,
) -> Tensor:
    """Weighted losses [c] of a chunk. Replaces the chunk's `logits` [c,V] by the gradient, and adds to `by_bias`."""
    num_rows = max(1, BLOCK_BYTES.get(logits.device.type, 2**28) // (4 * logits.shape[1]))
    losses = []
    for block, label, w in zip(logits.split(num_rows), labels.split(num_rows), weights.split(num_rows)):
        work, label, w = block.to(exact), label[:, None], w[:, None]  # [b,V], [b,1], [b,1]
        if bias is not None:
            work.add_(bias)
        gold = work.gather(-1, label)  # [b,1]
        largest = work.amax(-1, keepdim=True)
        total = work.sub_(largest).exp_().sum(-1, keepdim=True)
        log_z = largest + total.log()
        loss = total.log() + (largest - gold)  # in this order a confident token keeps its digits
        losses.append((w * (loss + z_loss * log_z.square())).squeeze(-1))
        if not needs_gradient:
            continue
        work.mul_(w * (1 + 2 * z_loss * log_z) / total).scatter_add_(-1, label, -w)
        if by_bias is not None:
            by_bias += work.sum(0)
        if work is not block:
            block.copy_(work)
    return torch.cat(losses)
