"""The chunked linear cross-entropy itself: numerics, formats, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from step3vl.losses.linear import linear_cross_entropy


def make(num_rows=37, width=24, vocab=301, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    rows = torch.randn(num_rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.3).to(dtype).requires_grad_()
    return rows, weight, torch.randint(0, vocab, (num_rows,)), torch.rand(num_rows)


def plain(rows, weight, labels, weights, z_loss=0.0):
    logits = (rows @ weight.T).float()
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * logits.logsumexp(-1).square()
    return (losses * weights).sum()


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("chunk_size", [1, 7, 37, 1000])
def test_values_and_gradients_in_fp32(chunk_size):
    rows, weight, labels, weights = make()
    expected = plain(rows, weight, labels, weights)
    got = linear_cross_entropy(rows, weight, None, labels, weights, chunk_size=chunk_size)
    assert abs(got / expected - 1) < 1e-6
    for a, b in zip(torch.autograd.grad(got, [rows, weight]), torch.autograd.grad(expected, [rows, weight])):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradients_are_those_of_autograd_in_fp64(z_loss):
    rows, weight, labels, weights = make()
    rows, weight = (t.detach().double().requires_grad_() for t in (rows, weight))
    bias = torch.randn(301, dtype=torch.float64, requires_grad=True)
    logits = rows @ weight.T + bias
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * logits.logsumexp(-1).square()
    wanted = torch.autograd.grad((losses * weights).sum(), [rows, weight, bias])
    value = linear_cross_entropy(rows, weight, bias, labels, weights, z_loss, chunk_size=10)
    for a, b in zip(torch.autograd.grad(value, [rows, weight, bias]), wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_backward_scales_by_what_comes_from_above(scale):
    rows, weight, labels, weights = make()
    one = torch.autograd.grad(linear_cross_entropy(rows, weight, None, labels, weights), [rows, weight])
    more = torch.autograd.grad(scale * linear_cross_entropy(rows, weight, None, labels, weights), [rows, weight])
    for a, b in zip(more, one):
        torch.testing.assert_close(a, scale * b)


@pytest.mark.parametrize("way", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("chunk_size", [256, 100])
def test_bf16_stays_within_its_noise_and_the_sum_is_not_rounded(way, chunk_size):
    rows, weight, labels, weights = make(256, 64, 1009)
    exact = plain(rows, weight, labels, weights)
    wanted = torch.autograd.grad(exact, [rows, weight])
    if way == "bf16 weights":
        rows, weight = (t.detach().bfloat16().requires_grad_() for t in (rows, weight))
        theirs = plain(rows, weight, labels, weights)
        got = linear_cross_entropy(rows, weight, None, labels, weights, chunk_size=chunk_size)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = plain(rows, weight, labels, weights)
            got = linear_cross_entropy(rows, weight, None, labels, weights, chunk_size=chunk_size)
    assert got.dtype == torch.float32 and got != got.bfloat16()
    assert abs(got / theirs - 1) < 1e-6  # the same logits, summed in fp32
    ours = torch.autograd.grad(got, [rows, weight])
    usual = torch.autograd.grad(theirs, [rows, weight])
    for a, b, c, tensor in zip(ours, usual, wanted, (rows, weight)):
        assert a.dtype == tensor.dtype
        assert relative(a, c) < 1.1 * relative(b, c) + 1e-4 and relative(a, c) < 1e-2


def test_many_chunks_lose_nothing_in_bf16():
    """Chunks are summed in fp32: 512 of them are as exact as one."""
    rows, weight, labels, weights = make(512, 16, 64, torch.bfloat16)
    exact = torch.autograd.grad(plain(rows.float(), weight.float(), labels, weights), weight)[0]
    by_chunk_size = {
        size: torch.autograd.grad(linear_cross_entropy(rows, weight, None, labels, weights, 0.0, size), weight)[0]
        for size in (1, 512)
    }
    assert relative(by_chunk_size[1], exact) < 1.2 * relative(by_chunk_size[512], exact)


def test_confident_and_huge_logits():
    """Logits in the thousands, labels that are almost certain: finite, and the gradient keeps its relative accuracy."""
    rows, weight, labels, weights = make()
    rows = (rows.detach() * 300).requires_grad_()
    labels = (rows @ weight.T).argmax(-1)
    expected, got = plain(rows, weight, labels, weights), linear_cross_entropy(rows, weight, None, labels, weights)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, [rows, weight]), torch.autograd.grad(expected, [rows, weight])):
        assert a.isfinite().all() and relative(a, b) < 1e-5


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows, weight, labels, weights = make()
    bias = torch.randn(301, requires_grad=True)
    results = []
    for size in (1, 10**9):
        monkeypatch.setitem(linear_cross_entropy.__globals__["BLOCK_BYTES"], "cpu", size)
        value = linear_cross_entropy(rows, weight, bias, labels, weights, 1e-3, chunk_size=10)
        results.append([value, *torch.autograd.grad(value, [rows, weight, bias])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_without_gradients_only_the_value_is_computed():
    rows, weight, labels, weights = make()
    expected = float(plain(rows, weight, labels, weights).detach())
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                products.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        value = linear_cross_entropy(rows, weight, None, labels, weights, chunk_size=37)
    assert not value.requires_grad and float(value) == pytest.approx(expected, rel=1e-6) and len(products) == 1
    with Count():
        linear_cross_entropy(rows, weight, None, labels, weights, chunk_size=37)
    assert len(products) == 1 + 3
    with Count():
        linear_cross_entropy(rows, weight.detach(), None, labels, weights, chunk_size=37)
    assert len(products) == 4 + 2, "a frozen head has no gradient to compute"


def test_a_second_backward_and_second_derivatives_are_refused():
    rows, weight, labels, weights = make()
    value = linear_cross_entropy(rows, weight, None, labels, weights)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands out its gradient once"):
        value.backward()
    with pytest.raises(RuntimeError, match="create_graph=True is not possible"):
        torch.autograd.grad(linear_cross_entropy(rows, weight, None, labels, weights), rows, create_graph=True)


def test_a_label_outside_the_vocabulary_is_an_error():
    rows, weight, labels, weights = make()
    labels[3] = 301
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(rows, weight, None, labels, weights)


@pytest.mark.parametrize(("chunk_size", "most"), [(50, 50), (None, 32)])
def test_no_more_logits_exist_than_a_chunk_s(chunk_size, most, monkeypatch):
    """By default a chunk has as many logits as the head has weights, here 32 rows for a width of 32."""
    monkeypatch.setitem(linear_cross_entropy.__globals__, "SMALL_CHUNK", 1)
    rows, weight, labels, weights = make(400, 32, 1009)
    largest = [0]

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and 1009 in out.shape[-1:]:
                largest[0] = max(largest[0], len(out))
            return out

    with Sizes():
        linear_cross_entropy(rows, weight, None, labels, weights, chunk_size=chunk_size).backward()
    assert largest[0] == most
