"""Packed rows on a GPU: what is given to torch's kernel, checked where that kernel cannot run.

`torch.nn.attention.varlen.varlen_attn` has no CPU kernel. Here it is replaced by a reference with its signature, which
attends document by document in fp32, and `has_varlen_kernel` is told that the device has it; nothing else of ours is
replaced. tests/gpu/test_attention.py compares the kernel itself.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from step3vl.models import Qwen3Decoder, attention
from step3vl.models.attention import packing_arguments, per_document_attention, varlen_applies, varlen_attention

REAL = varlen.varlen_attn
LENGTHS = [7, 1, 12, 4]
TOTAL = sum(LENGTHS)


def reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
    """What the kernel computes: query [T,H,d], key and value [T,K,d] -> [T,H,d]."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16, "the kernel takes 16 bits only"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and query.stride(-1) == key.stride(-1) == 1
    outputs = []
    for start, end in zip(cu_seq_k.tolist(), cu_seq_q.tolist()[1:], strict=False):
        assert end - start <= max_q == max_k, "a document longer than announced would be cut"
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))  # [H,t,d], [K,t,d]
        steps = torch.arange(end - start)
        seen = torch.ones(len(steps), len(steps), dtype=torch.bool)
        left, right = window_size
        seen &= (steps[:, None] - steps <= left) if left >= 0 else seen
        seen &= (steps - steps[:, None] <= right) if right >= 0 else seen
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[0] != k.shape[0]
        )
        outputs.append(mixed.transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1)):  # fmt: skip
    assert query.shape[1] == key.shape[1] == value.shape[1], "no grouped heads before enable_gqa"
    return reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@pytest.fixture(params=[torch_2_11, torch_2_13])
def kernel(request, monkeypatch):
    """A reference in torch's place; returns the number of its calls as a list."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return request.param(*args, **kwargs)

    counted.__signature__ = inspect.signature(request.param)
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: True)
    return calls


def heads(query_heads: int, key_heads: int, width: int = 16, lead_dtype: torch.dtype = torch.float32):
    """Query and key in `lead_dtype`, as norms with fp32 weights leave them under autocast; value in bf16."""
    torch.manual_seed(0)
    query = torch.randn(1, TOTAL, query_heads, width, dtype=lead_dtype).transpose(1, 2)
    key = torch.randn(1, TOTAL, key_heads, width, dtype=lead_dtype).transpose(1, 2)
    value = torch.randn(1, TOTAL, key_heads, width).bfloat16().transpose(1, 2)
    return [x.detach().requires_grad_() for x in (query, key, value)]


def run(inputs, scaling):
    output, _ = per_document_attention(
        torch.nn.Module(), *inputs, None, scaling=scaling, **packing_arguments(LENGTHS, torch.device("cpu"))
    )
    torch.manual_seed(1)
    upstream = torch.randn(output.shape).to(output.dtype)
    return output, torch.autograd.grad(output, inputs, upstream)


def test_the_reference_has_torchs_signature():
    assert inspect.signature(torch_2_13).parameters.keys() == inspect.signature(REAL).parameters.keys()


@pytest.mark.parametrize("scaling", [None, 0.4])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_one_kernel_equals_the_loop(kernel, monkeypatch, query_heads, key_heads, scaling):
    inputs = heads(query_heads, key_heads)
    one, one_gradients = run(inputs, scaling)
    assert kernel == [1]
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: False)
    loop, loop_gradients = run(inputs, scaling)
    assert kernel == [1], "the loop called the kernel"
    assert one.shape == loop.shape == (1, TOTAL, query_heads, 16) and one.dtype == loop.dtype == torch.bfloat16
    torch.testing.assert_close(one, loop, rtol=0, atol=2**-6)  # q and k are rounded to bf16 before, not in the loop
    for a, b in zip(one_gradients, loop_gradients, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() < 0.01 * b.float().norm()


def test_the_order_of_heads_is_kept(kernel):
    """Query heads 0 and 1 share key head 0: a change to value head 1 reaches query heads 2 and 3 alone."""
    query, key, value = (x.detach() for x in heads(4, 2))
    before = run([x.requires_grad_() for x in (query, key, value)], None)[0]
    other = value.detach().clone()
    other[:, 1] += 1
    after = run([query, key, other.requires_grad_()], None)[0]
    changed = (before != after).flatten(0, 1).any(0).any(-1)
    assert changed.tolist() == [False, False, True, True]


def test_a_decoder_through_the_kernel_equals_separate_documents(kernel):
    torch.manual_seed(0)
    decoder = Qwen3Decoder(64, 160, 2, 4, 2, 16, 128)
    ids = torch.randint(128, (1, TOTAL))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.autocast("cpu", torch.bfloat16):
        packed = decoder(decoder.embed(ids), positions)
    assert len(kernel) == 2  # one call a layer, whatever the number of documents
    for part, alone in zip(ids.split(LENGTHS, dim=1), packed.split(LENGTHS, dim=1)):
        expected = decoder(decoder.embed(part), torch.arange(part.shape[1])[None])
        assert (alone - expected).norm() < 0.02 * expected.norm()


def test_no_gradient_leaks_through_the_kernel(kernel):
    query, key, value = heads(4, 2)
    output, _ = per_document_attention(
        torch.nn.Module(), query, key, value, None, **packing_arguments(LENGTHS, torch.device("cpu"))
    )
    for gradient in torch.autograd.grad(output[:, 8:20].square().sum(), (query, key, value)):
        assert not gradient[:, :, :8].any() and not gradient[:, :, 20:].any()
        assert gradient[:, :, 8:20].any()


def test_torch_accepts_the_arguments():
    """The installed `varlen_attn` itself, on meta tensors: no kernel runs, but the call is checked, forth and back."""
    shapes = ((1, TOTAL, 8, 32), (1, TOTAL, 2, 32), (1, TOTAL, 2, 32))
    inputs = [torch.empty(s, device="meta", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for s in shapes]
    boundaries = packing_arguments(LENGTHS, torch.device("meta"))["cu_seq_lens_q"]
    output = varlen_attention(*inputs, boundaries, max(LENGTHS), 0.1)
    assert output.shape == (1, TOTAL, 8, 32) and output.dtype == torch.bfloat16
    for gradient, given in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
        assert gradient.shape == given.shape


def test_when_the_kernel_applies(monkeypatch):
    half = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)
    assert not varlen_applies(half), "a CPU has no such kernel"
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: True)
    assert varlen_applies(half) and varlen_applies(half.half())
    assert not varlen_applies(half.float())
    assert not varlen_applies(half, dropout=0.1)
    assert not varlen_applies(torch.zeros(1, 2, 5, 20, dtype=torch.bfloat16)), "20 channels are no multiple of 8"
    assert not varlen_applies(torch.zeros(1, 2, 5, 264, dtype=torch.bfloat16)), "264 channels are too many"
