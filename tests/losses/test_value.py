"""The critic's loss and explained variance against loops, and against spreading tokens over ranks."""

import math

import pytest
import torch

from step3vl.losses.policy_aggregate import Totals
from step3vl.losses.value import ClippedValue, explained_variance, value_sums


def make(num_tokens=40, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    old = torch.randn(num_tokens, dtype=torch.float64)
    values = (old + 0.3 * torch.randn(num_tokens, dtype=torch.float64)).to(dtype).requires_grad_()
    return values, old.to(dtype), torch.randn(num_tokens, dtype=torch.float64).to(dtype)


def loop(values, old, returns, clip):
    losses = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist()):
        near = v if clip is None else max(o - clip, min(o + clip, v))
        losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("clip", [None, 0.2, 0.05])
def test_the_loss_is_that_of_a_loop(clip):
    values, old, returns = make()
    assert ClippedValue(clip=clip)(values, old, returns).mean().item() == pytest.approx(
        loop(values, old, returns, clip), abs=1e-12
    )


def test_gradients_are_finite_differences():
    values, old, returns = make()
    loss = ClippedValue()
    (gradient,) = torch.autograd.grad(loss(values, old, returns).mean(), values)
    for k in range(len(values)):
        shift = torch.zeros_like(old)
        shift[k] = 1e-6
        up, down = (loss(values.detach() + sign * shift, old, returns).mean().item() for sign in (1, -1))
        assert float(gradient[k]) == pytest.approx((up - down) / 2e-6, abs=1e-6)
    assert 0 < int((gradient == 0).sum()) < len(gradient)


@pytest.mark.parametrize("totals", [None, Totals(40, 3)])
def test_micro_batches_change_nothing(totals):
    values, old, returns = make()
    parts = [ClippedValue()(values[p], old[p], returns[p], totals) for p in (slice(7), slice(7, 7), slice(7, 40))]
    loss = sum(p.value for p in parts) / sum(p.weight for p in parts)
    whole = ClippedValue()(values, old, returns).mean()
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    pair = [torch.autograd.grad(x, values)[0] for x in (loss, whole)]
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-15)


def test_what_cannot_be_judged_teaches_nothing():
    values, old, returns = make()
    returns[::3] = float("nan")
    keep = ~returns.isnan()
    loss = ClippedValue()(values, old, returns)
    assert float(loss.weight) == int(keep.sum())
    torch.testing.assert_close(loss.mean(), ClippedValue()(values[keep], old[keep], returns[keep]).mean())
    (gradient,) = torch.autograd.grad(loss.mean(), values)
    assert (gradient[~keep] == 0).all() and gradient.isfinite().all()
    loss = ClippedValue()(values, old, torch.full_like(returns, float("nan")))
    loss.value.backward()
    assert loss.value.item() == 0 and loss.weight.item() == 0


def test_16_bit_inputs_are_computed_in_fp32():
    values, old, returns = make(dtype=torch.bfloat16)
    loss = ClippedValue()(values, old, returns)
    assert loss.value.dtype == torch.float32
    wanted = loop(values.double(), old.double(), returns.double(), 0.2)
    assert loss.mean().item() == pytest.approx(wanted, rel=1e-6)


def test_explained_variance_over_ranks():
    values, _, returns = make()
    returns[5] = float("nan")
    keep = ~returns.isnan()
    v, r = values.detach()[keep], returns[keep]
    wanted = float(1 - (r - v).var(correction=0) / r.var(correction=0))
    assert explained_variance(value_sums(values, returns)) == pytest.approx(wanted, abs=1e-12)
    sums = sum(value_sums(values[p], returns[p]) for p in (slice(3), slice(3, 3), slice(3, 40)))
    assert explained_variance(sums) == pytest.approx(wanted, abs=1e-12)


def test_explained_variance_at_its_marks():
    returns = torch.randn(100)
    assert explained_variance(value_sums(returns, returns)) == pytest.approx(1.0)
    assert explained_variance(value_sums(torch.full_like(returns, 3.0), returns)) == pytest.approx(0.0, abs=1e-6)
    for constant in (0.1, 1.3, 9.1, 123.456):  # whichever way the sums round
        assert math.isnan(explained_variance(value_sums(returns, torch.full((100,), constant, dtype=torch.float64))))
    assert math.isnan(explained_variance(value_sums(returns[:0], returns[:0])))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        ClippedValue()(torch.zeros(3), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="clip"):
        ClippedValue(clip=0.0)
