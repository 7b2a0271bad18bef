"""Attention by groups and by products on a CPU: what each document gets by itself, forward and backward."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from step3vl.models import cpu_attention
from step3vl.models.attention import attend, packing_arguments, per_document_attention
from step3vl.models.cpu_attention import SPARE_PAIRS, attend_by_groups, attend_by_products, group, products_apply

LENGTHS = [5, 130, 1, 64, 7, 200, 66, 3]


def inputs(length: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype, num: int = 1) -> list[Tensor]:
    """query, key, value [n,H,T,d] as layers make them: not contiguous."""
    torch.manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    made = [torch.randn(num, length, count, 16, dtype=torch.float32).to(dtype).transpose(1, 2) for count in heads]
    return [x.requires_grad_() for x in made]


def results(function, tensors: list[Tensor]) -> list[Tensor]:
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), tensors)]


def one_by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every document alone, in float32."""
    documents = zip(*(x.float().split(LENGTHS, dim=2) for x in (query, key, value)))
    return torch.cat([attend(*document, is_causal=True) for document in documents], dim=2).transpose(1, 2)


@pytest.mark.parametrize("spare", [0, SPARE_PAIRS, 10**9])
def test_groups_hold_every_token_once(monkeypatch, spare):
    monkeypatch.setattr(cpu_attention, "SPARE_PAIRS", spare)
    for seed in range(20):
        lengths = [random.Random(seed * 100 + k).randint(1, 90) for k in range(seed + 1)]
        groups = group(lengths)
        assert sum(number for number, _ in groups.sizes) == len(lengths)
        assert torch.equal(groups.place[groups.row], torch.arange(sum(lengths)))
        assert len(groups.place) == sum(number * longest for number, longest in groups.sizes)
        assert int((~groups.is_padding).sum()) == sum(lengths)
    assert len(group([50] * 9).sizes) == 1  # equal documents share a call, whatever may be spared
    assert spare == 0 or len(group([50, 49]).sizes) == 1


def test_groups_change_nothing_in_fp32():
    tensors = inputs(sum(LENGTHS), 4, 2, torch.float32)
    causal = partial(attend, is_causal=True)
    groups = group(LENGTHS)
    assert 1 < len(groups.sizes) < len(LENGTHS)
    grouped = results(lambda q, k, v: attend_by_groups(causal, q, k, v, groups), tensors)
    for found, wanted in zip(grouped, results(one_by_one, tensors)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [2**28, 0])
@pytest.mark.parametrize("part", [2**24, 1])
@pytest.mark.parametrize("is_causal", [True, False])
def test_products_are_attention_in_fp32(monkeypatch, is_causal, part, kept):
    """In parts or whole, kept or made again in backward."""
    monkeypatch.setattr(cpu_attention, "PART_BYTES", part)
    monkeypatch.setattr(cpu_attention, "KEPT_BYTES", kept)
    tensors = inputs(40, 6, 2, torch.float32, num=3)
    by_products = results(lambda q, k, v: attend_by_products(q, k, v, is_causal, 0.3), tensors)
    for found, wanted in zip(by_products, results(partial(attend, is_causal=is_causal, scale=0.3), tensors)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_packed_row_in_bfloat16_is_its_documents_one_by_one():
    tensors = inputs(sum(LENGTHS), 4, 2, torch.bfloat16)
    arguments = packing_arguments(LENGTHS, torch.device("cpu"))
    packed = results(lambda *x: per_document_attention(torch.nn.Module(), *x, None, **arguments)[0], tensors)
    for found, wanted in zip(packed, results(one_by_one, tensors)):
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()


def test_no_document_sees_another(monkeypatch):
    query, key, value = inputs(sum(LENGTHS), 4, 2, torch.bfloat16)
    arguments = packing_arguments(LENGTHS, torch.device("cpu"))
    before, _ = per_document_attention(torch.nn.Module(), query, key, value, None, **arguments)
    changed = value.detach().clone()
    changed[:, :, 5:135] += 1  # the second document
    after, _ = per_document_attention(torch.nn.Module(), query, key, changed, None, **arguments)
    same = (before == after).flatten(2).all(-1)[0]
    assert same[:5].all() and same[135:].all() and not same[5:135].any()


def test_products_are_for_16_bits_on_a_cpu():
    query, key, value = inputs(40, 2, 2, torch.bfloat16)
    assert products_apply(query, key, value, True)
    assert not products_apply(query, key, value, True, dropout=0.1)
    assert not products_apply(query.float(), key.float(), value.float(), True)
    assert not products_apply(*(x.to("meta") for x in (query, key, value)), True)
    longer = torch.empty(1, 2, 4096, 16, dtype=torch.bfloat16)
    assert not products_apply(longer, longer, longer, True)
    assert products_apply(longer, longer, longer, False)
