"""The Bradley-Terry loss of pairs, against its formula, TRL's and finite differences."""

import math

import pytest
import torch

from step3vl.losses.preference import BradleyTerry, preference_accuracy, preference_margin


def make(num_pairs=12, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, num_pairs, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
def test_the_loss_is_its_formula(center_coef):
    """The terms and means are those of TRL's RewardTrainer (its margin and centring), which needs a model to call."""
    chosen, rejected = make()
    margins = torch.rand(12, dtype=torch.float64)
    for given in (None, margins):
        gaps = (chosen - rejected - (0 if given is None else margins)).tolist()
        wanted = sum(-math.log(1 / (1 + math.exp(-gap))) for gap in gaps) / 12
        wanted += center_coef * float(((chosen + rejected) ** 2).mean())
        loss = BradleyTerry(center_coef=center_coef)(chosen, rejected, given)
        assert loss.mean().item() == pytest.approx(wanted, abs=1e-12)


def test_gradients_are_finite_differences():
    pair = [t.clone().requires_grad_() for t in make()]
    loss = BradleyTerry(center_coef=0.1)
    found = torch.autograd.grad(loss(*pair).mean(), pair)
    for which in (0, 1):
        for k in range(12):
            sides = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in pair]
                moved[which][k] += sign * 1e-6
                sides.append(loss(*moved).mean().item())
            assert float(found[which][k]) == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6)


def test_micro_batches_and_weights():
    chosen, rejected = make()
    weights = torch.rand(12, dtype=torch.float64)
    whole = BradleyTerry()(chosen, rejected, weights=weights)
    parts = [BradleyTerry()(chosen[p], rejected[p], weights=weights[p]) for p in (slice(5), slice(5, 5), slice(5, 12))]
    loss = sum(p.value for p in parts) / sum(p.weight for p in parts)
    torch.testing.assert_close(loss, whole.mean(), rtol=1e-12, atol=0)
    wanted = (torch.nn.functional.softplus(rejected - chosen) * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)


def test_extreme_scores_stay_finite_and_16_bit_is_computed_in_fp32():
    chosen = torch.tensor([1e4, -1e4, 0.0]).bfloat16().requires_grad_()
    loss = BradleyTerry()(chosen, -chosen.detach())
    assert loss.value.dtype == torch.float32
    assert loss.value.item() == pytest.approx(2 * chosen[0].item() + math.log(2), rel=1e-6)
    loss.value.backward()
    assert chosen.grad.isfinite().all()


def test_accuracy_and_margin():
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.tensor([0.0, 2.0, 3.0, -2.0])
    assert float(preference_accuracy(chosen, rejected).mean()) == 2.5 / 4
    assert float(preference_margin(chosen, rejected).mean()) == -0.25
    parts = [preference_accuracy(chosen[p], rejected[p]) for p in (slice(1), slice(1, 4))]
    assert sum(float(p.value) for p in parts) / sum(float(p.weight) for p in parts) == 2.5 / 4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="as many pairs"):
        BradleyTerry()(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="as many pairs"):
        preference_accuracy(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="center_coef"):
        BradleyTerry(center_coef=-1.0)
