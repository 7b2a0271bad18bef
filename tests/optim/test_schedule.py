"""Schedules hit their corners."""

import pytest
import torch

from step3vl.optim import WarmupCosine, WarmupStableDecay


def rates(make, num_steps=100):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, out = make(optimizer), []
    for _ in range(num_steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*out, optimizer.param_groups[0]["lr"]]


def test_cosine():
    values = rates(lambda o: WarmupCosine(o, total_steps=100, warmup_steps=10, min_lr_ratio=0.2))
    assert values[0] == pytest.approx(0.2) and values[9] == pytest.approx(2.0) and values[10] == pytest.approx(2.0)
    assert values[55] == pytest.approx((2.0 + 0.4) / 2) and values[100] == pytest.approx(0.4)
    assert all(a >= b for a, b in zip(values[10:], values[11:]))


def test_warmup_stable_decay():
    values = rates(lambda o: WarmupStableDecay(o, total_steps=100, warmup_steps=10, decay_share=0.4))
    assert values[10] == values[59] == 2.0 and values[80] == pytest.approx(1.0) and values[100] == 0.0


@pytest.mark.parametrize(
    "bad", [dict(total_steps=0), dict(total_steps=5, warmup_steps=-1), dict(total_steps=5, min_lr_ratio=2)]
)
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError):
        rates(lambda o: WarmupCosine(o, **bad))
