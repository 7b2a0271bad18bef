"""The terms of self-distillation equal their formulas, and do what they are for."""

import math

import pytest
import torch
import torch.nn.functional as F

from step3vl.losses.self_distillation import (
    SelfDistillation,
    cross_view,
    keep_apart,
    masked_patches,
    sinkhorn_knopp,
)


def test_sinkhorn_gives_every_prototype_its_share():
    torch.manual_seed(0)
    logits = torch.randn(64, 8) + torch.tensor([4.0, *[0.0] * 7])  # the first prototype would take all
    assert (F.softmax(logits / 0.5, -1).sum(0)[0] > 50).all()
    found = sinkhorn_knopp(logits, 0.5, num_iterations=50)
    torch.testing.assert_close(found.sum(1), torch.ones(64))
    torch.testing.assert_close(found.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    three = sinkhorn_knopp(logits, 0.5)
    torch.testing.assert_close(three.sum(1), torch.ones(64))
    assert three.sum(0)[0] < 12


def test_sinkhorn_survives_large_logits_and_no_rows():
    found = sinkhorn_knopp(torch.tensor([[1000.0, 0.0], [999.0, 5.0]]), 0.04)
    assert found.isfinite().all()
    assert sinkhorn_knopp(torch.zeros(0, 4), 0.04).shape == (0, 4)


def test_cross_view_by_loops_leaves_out_the_same_crop():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, 4), F.softmax(torch.randn(2, 3, 4), -1)
    expected, num = 0.0, 0
    for g in range(2):
        for s in range(5):
            if s != g:
                num += 1
                for i in range(3):
                    expected -= float((teacher[g, i] * F.log_softmax(student[s, i] / 0.1, -1)).sum())
    found = cross_view(student, teacher, 0.1, num_same=2)
    assert num == 8 and float(found.value) == pytest.approx(expected / num, rel=1e-5)
    assert float(found.weight) == 3


def test_masked_patches_by_loops():
    torch.manual_seed(0)
    masked = torch.zeros(2, 3, 5, dtype=torch.bool)  # G, n, P
    masked[0, 0, [1, 3]] = masked[1, 2, [0]] = True
    masked[1, 0] = True
    num = int(masked.sum())
    student, teacher = torch.randn(num, 4), F.softmax(torch.randn(num, 4), -1)
    losses = -(teacher * F.log_softmax(student / 0.1, -1)).sum(-1)
    expected = (losses[:2].mean() + losses[2:7].mean() + losses[7:].mean()) / 2  # means of crops, halved
    found = masked_patches(student, teacher, masked, 0.1)
    torch.testing.assert_close(found.value, expected)
    assert float(found.weight) == 3
    none = masked_patches(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros_like(masked), 0.1)
    assert float(none.value) == 0


def test_keep_apart_is_koleo():
    torch.manual_seed(0)
    features = torch.randn(6, 3, requires_grad=True)
    unit = F.normalize(features.detach(), dim=-1)
    distances = torch.cdist(unit, unit) + 9 * torch.eye(6)
    found = keep_apart(features)
    assert float(found.value.detach()) == pytest.approx(float(-distances.min(1).values.log().sum()), rel=1e-4)
    found.value.backward()
    moved = F.normalize(features.detach() - 0.01 * features.grad, dim=-1)
    assert float(keep_apart(moved).value) < float(found.value.detach())
    equal = torch.ones(3, 2, requires_grad=True)
    keep_apart(equal).value.backward()
    assert equal.grad.isfinite().all()


def test_teacher_temperature_warms_up():
    loss = SelfDistillation(warmup_steps=10)
    assert loss.temperature(0) == pytest.approx(0.04)
    assert loss.temperature(5) == pytest.approx(0.055)
    assert loss.temperature(10) == loss.temperature(99) == pytest.approx(0.07)
    assert SelfDistillation().temperature(0) == pytest.approx(0.07)


def test_bad_input():
    with pytest.raises(ValueError, match="temperatures"):
        SelfDistillation(student_temperature=0)
    with pytest.raises(ValueError, match="num_sinkhorn at least 1"):
        SelfDistillation(num_sinkhorn=0)
    assert math.isclose(SelfDistillation().koleo_weight, 0.1)
