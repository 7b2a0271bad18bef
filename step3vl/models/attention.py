"""Attention over a packed row, one document at a time, for the decoder's transformers layers.

Documents of a row lie end to end; each attends to itself alone, causally, and no T x T mask is built. The same keyword
arguments drive flash attention on a GPU. How rows are packed is not given in the report; ours, equal to separate rows.

Shapes: T tokens of the flattened row, H query heads, K key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "per_document"


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

    Computed in `kernel_dtype`.
    """
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
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def per_document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1,H,T,d], key and value [1,K,T,d] -> [1,T,H,d].

    Without boundaries this is transformers' own sdpa, with the mask it is given. Lengths as a list spare one wait for
    the device in every layer.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        q, k, v = (x.to(kernel_dtype(value)) for x in (query, key, value))
        with torch.autocast("cpu", enabled=False):  # it would cast back
            output, _ = sdpa_attention_forward(
                module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return output.to(value.dtype), None
    lengths = list(document_lengths) if document_lengths is not None else cu_seq_lens_q.diff().tolist()
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    mixed = [attend(q, k, v, is_causal=True, dropout=dropout, scale=scaling) for q, k, v in documents]
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make "per_document" known to transformers; may be called any number of times."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, per_document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
