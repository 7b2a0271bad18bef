"""Attention over a packed row, each document to itself alone, for the decoder's transformers layers.

Documents of a row lie end to end; each attends to itself, causally, and no T x T mask is built. On a GPU in 16 bits one
kernel takes all documents (torch's `varlen_attn`, a flash attention); anywhere else they are attended one by one. How
rows are packed is not given in the report; ours, equal to separate rows.

Shapes: T tokens of the flattened row, H query heads, K key heads, d width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.models.branches import Seen, attend_branches
from step3vl.models.cpu_attention import Groups, attend_by_groups, attend_by_products, group, products_apply

NAME = "per_document"
WIDEST_HEAD = 256
"""Channels of a head that flash attention can take; they must also be a multiple of 8."""


class PromptTape(ABC):
    """Takes down the keys and values of packed rows as layers make them, for decoding steps that follow."""

    @abstractmethod
    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Of one layer: key and value [1,K,T,d]."""


class StepCache(ABC):
    """Attends for decoding steps, one new token a row, over the keys and values that it holds."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Of one layer: query [R,H,1,d], and key and value [R,K,1,d] of the new tokens -> [R,1,H,d]."""


def kernel_dtype(value: Tensor) -> torch.dtype:
    """What attention is computed in: value's dtype; on a CPU float32, as bfloat16's backward is three times slower."""
    return torch.float32 if value.device.type == "cpu" else value.dtype


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention [n,H,T,d] over keys and values [n,K,T,d], with K dividing H; the result has value's dtype.

    Computed in `kernel_dtype`; in bfloat16 on a CPU by products, where `products_apply`.
    """
    if products_apply(query, key, value, is_causal, dropout):
        with torch.autocast("cpu", enabled=False):
            return attend_by_products(query.to(value.dtype), key.to(value.dtype), value, is_causal, scale)
    grouped = query.shape[1] != key.shape[1]
    dtype = kernel_dtype(value)
    with torch.autocast("cpu", enabled=False):  # it would cast back
        mixed = F.scaled_dot_product_attention(
            query.to(dtype),
            key.to(dtype),
            value.to(dtype),
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=grouped,
        )
    return mixed.to(value.dtype)


def document_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of the documents of packed rows [B,T], in reading order. A position 0, or a row's start, starts one."""
    starts = position_ids == 0
    starts[:, 0] = True
    at = starts.flatten().nonzero().squeeze(1)
    ends = torch.cat([at[1:], at.new_tensor([position_ids.numel()])])
    return (ends - at).tolist()


def packing_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What attention layers need to know of a packed row: lengths for ours, boundaries for flash attention."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    return {
        "document_lengths": list(lengths),
        "document_groups": group(lengths) if device.type == "cpu" else None,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@cache
def has_varlen_kernel(device: torch.device) -> bool:
    """Whether torch's flash attention for packed rows runs there: NVIDIA, compute capability 8.0 and above."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def varlen_applies(value: Tensor, dropout: float = 0.0) -> bool:
    """Whether `varlen_attention` can take values [1,K,T,d]: a GPU that has the kernel, 16 bits, no dropout."""
    is_16_bit = value.dtype in (torch.float16, torch.bfloat16)
    fits = value.shape[-1] <= WIDEST_HEAD and value.shape[-1] % 8 == 0
    return is_16_bit and fits and not dropout and has_varlen_kernel(value.device)


@cache
def _takes_groups(kernel: Callable) -> bool:
    """Whether `varlen_attn` can be told of fewer key than query heads: from torch 2.12 on, but not in 2.11."""
    return "enable_gqa" in signature(kernel).parameters


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float | None = None
) -> Tensor:
    """Causal attention inside every document, in one kernel: query [1,H,T,d], key and value [1,K,T,d] -> [1,T,H,d].

    Args:
        query, key, value: of the flattened row; computed in value's dtype.
        boundaries: [documents + 1] int32, where documents start, and T.
        longest: tokens of the longest document.
        scale: factor of the scores; None: 1 / sqrt(d).
    """
    from torch.nn.attention import varlen

    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # [T,H,d], [T,K,d], [T,K,d]
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # all earlier keys, no later ones
    if _takes_groups(varlen.varlen_attn):
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [T,H,d]
    mixed = varlen.varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **options)
    return cast(Tensor, mixed)[None]


def per_document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    document_lengths: Sequence[int] | None = None,
    document_groups: Groups | None = None,
    document_masks: Sequence[Seen] | None = None,
    prompt_tape: PromptTape | None = None,
    step_cache: StepCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1,H,T,d], key and value [1,K,T,d] -> [1,T,H,d].

    With boundaries the row is packed: `varlen_attention` where `varlen_applies`, else a loop over documents; a tape
    takes keys and values down, and masks are those of branches. A step cache attends by itself. With none of them this
    is transformers' own sdpa, with its mask. Lengths as a list spare one wait for the device in every layer.
    """
    if step_cache is not None:
        return step_cache.attend(cast(int, module.layer_idx), query, key, value, scaling), None
    if prompt_tape is not None:
        prompt_tape.record(cast(int, module.layer_idx), key, value)
    if cu_seq_lens_q is None:
        if attention_mask is None and not getattr(module, "is_causal", True):
            return attend(query, key, value, dropout=dropout, scale=scaling).transpose(1, 2).contiguous(), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        q, k, v = (x.to(kernel_dtype(value)) for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):  # it would cast back
            output, _ = sdpa_attention_forward(
                module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return output.to(value.dtype), None
    lengths = list(document_lengths) if document_lengths is not None else cu_seq_lens_q.diff().tolist()
    if document_masks is not None:
        causal = partial(attend, is_causal=True, dropout=dropout, scale=scaling)
        return attend_branches(causal, query, key, value, lengths, document_masks, scaling), None
    if varlen_applies(value, dropout):
        return varlen_attention(query, key, value, cu_seq_lens_q, max_length_q or max(lengths), scaling), None
    if document_groups is not None and value.dtype == torch.bfloat16:  # a CPU, where 16 bits gain by larger products
        causal = partial(attend, is_causal=True, dropout=dropout, scale=scaling)
        return attend_by_groups(causal, query, key, value, document_groups), None
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    mixed = [attend(q, k, v, is_causal=True, dropout=dropout, scale=scaling) for q, k, v in documents]
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "per_document" known to transformers; may be called any number of times."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, per_document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
