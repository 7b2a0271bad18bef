"""Schedules against their closed forms and at their corners."""

import math

import pytest
import torch

from step3vl.config import compose
from step3vl.optim import TwoPhase, WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay

PEAK = 2.0


def rates(make, num_steps=100, peak=PEAK):
    """The rate at every step 0..num_steps, as the optimizer sees it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule, out = make(optimizer), []
    for _ in range(num_steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*out, optimizer.param_groups[0]["lr"]]


def warming(num_steps):
    return [PEAK * (step + 1) / num_steps for step in range(num_steps)]


def test_cosine():
    values = rates(lambda o: WarmupCosine(o, total_steps=100, warmup_steps=10, min_lr_ratio=0.2))
    low = 0.2 * PEAK
    closed = [low + (PEAK - low) * 0.5 * (1 + math.cos(math.pi * k / 90)) for k in range(91)]
    assert values == pytest.approx(warming(10) + closed)
    assert values[9] == values[10] == PEAK and values[55] == pytest.approx(1.2) and values[100] == pytest.approx(low)


def test_linear():
    values = rates(lambda o: WarmupLinear(o, total_steps=100, warmup_steps=10, min_lr_ratio=0.1))
    assert values == pytest.approx(warming(10) + [PEAK * (1 - 0.9 * k / 90) for k in range(91)])


def test_constant():
    assert rates(lambda o: WarmupConstant(o, warmup_steps=10)) == pytest.approx(warming(10) + [PEAK] * 91)
    assert rates(lambda o: WarmupConstant(o), 3) == [PEAK] * 4


def test_warmup_stable_decay():
    values = rates(lambda o: WarmupStableDecay(o, total_steps=100, warmup_steps=10, decay_share=0.4))
    assert values == pytest.approx(warming(10) + [PEAK] * 50 + [PEAK * (1 - k / 40) for k in range(41)])
    assert values[10] == values[60] == PEAK and values[80] == pytest.approx(1.0) and values[100] == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda o: WarmupCosine(o, total_steps=50, min_lr_ratio=0.3),
        lambda o: WarmupLinear(o, total_steps=50, min_lr_ratio=0.3),
        lambda o: WarmupStableDecay(o, total_steps=50, min_lr_ratio=0.3),
        lambda o: TwoPhase(o, total_steps=50, min_lr_ratio=0.3),
    ],
)
def test_the_floor_holds_after_the_end(make):
    assert rates(make, 60)[50:] == pytest.approx([0.3 * PEAK] * 11)


@pytest.mark.parametrize("total_steps", [1, 5, 20])
def test_a_run_cut_short_may_end_inside_its_warm_up(total_steps):
    for make in (WarmupCosine, WarmupLinear, WarmupStableDecay, TwoPhase):
        values = rates(lambda o, m=make: m(o, total_steps=total_steps, warmup_steps=20), total_steps)
        assert values[:total_steps] == pytest.approx(warming(20)[:total_steps])


# ------------------------------------------------------------------------------------------------ two phases


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_two_phases_hit_the_report_s_rates(shape):
    """5e-5 -> 1e-5 over 900B tokens, 1e-5 -> 6e-6 over 300B."""
    values = rates(lambda o: TwoPhase(o, total_steps=1200, warmup_steps=10, shape=shape), 1200, peak=5e-5)
    assert values[0] == pytest.approx(5e-6) and values[9] == values[10] == pytest.approx(5e-5)
    assert values[900] == pytest.approx(1e-5) and values[1200] == pytest.approx(6e-6)
    assert values[455] == pytest.approx(3e-5) and values[1050] == pytest.approx(8e-6)  # half-way through each phase
    assert all(a >= b for a, b in zip(values[10:], values[11:]))
    quarter = {"cosine": 6e-6 + 4e-6 * 0.5 * (1 + math.cos(math.pi / 4)), "linear": 9e-6}[shape]
    assert values[975] == pytest.approx(quarter)


@pytest.mark.parametrize(("shape", "single"), [("cosine", WarmupCosine), ("linear", WarmupLinear)])
def test_one_run_of_two_phases_equals_two_runs(shape, single):
    whole = rates(lambda o: TwoPhase(o, total_steps=400, warmup_steps=20, shape=shape), 400)
    first = rates(lambda o: single(o, total_steps=300, warmup_steps=20, min_lr_ratio=0.2), 300)
    second = rates(lambda o: single(o, total_steps=100, min_lr_ratio=0.6), 100, peak=0.2 * PEAK)
    assert whole == pytest.approx(first[:-1] + second)


def test_the_two_phase_card_is_the_two_experiments(tmp_path):
    """The card's numbers follow from the budgets of the two pre-training runs."""
    budgets = "first: budget/pretrain_phase1.yaml\nsecond: budget/pretrain_phase2.yaml\n"
    text = "vars: {warmup_steps: 1}\ntrainer: {max_steps: 1}\ncard: schedule/two_phase.yaml\n" + budgets
    (tmp_path / "run.yaml").write_text(text)
    config = compose([tmp_path / "run.yaml"], scale="paper").config
    card, first, second = config["card"]["init_args"], config["first"], config["second"]
    assert card["phase_1_share"] == first["max_steps"] / (first["max_steps"] + second["max_steps"])
    assert card["mid_lr_ratio"] == first["min_lr_ratio"] == pytest.approx(second["lr"] / first["lr"])
    assert card["min_lr_ratio"] == pytest.approx(second["lr"] * second["min_lr_ratio"] / first["lr"])


def test_groups_keep_their_own_peak_and_a_resumed_schedule_goes_on():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]

    def make():
        return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 0.1))])

    straight, first = make(), make()
    a, b = TwoPhase(straight, total_steps=40), TwoPhase(first, total_steps=40)
    for _ in range(33):
        straight.step(), a.step()
    for _ in range(15):
        first.step(), b.step()
    again = make()
    c = TwoPhase(again, total_steps=40)
    again.load_state_dict(first.state_dict()), c.load_state_dict(b.state_dict())
    for _ in range(18):
        again.step(), c.step()
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in straight.param_groups]
    assert straight.param_groups[0]["lr"] == pytest.approx(10 * straight.param_groups[1]["lr"])


@pytest.mark.parametrize(
    ("make", "bad", "sentence"),
    [
        (WarmupCosine, dict(total_steps=0), "total_steps >= 1 and warmup_steps >= 0, got 0 and 0"),
        (WarmupLinear, dict(total_steps=5, warmup_steps=-1), "got 5 and -1"),
        (WarmupConstant, dict(warmup_steps=-1), "got 1 and -1"),
        (WarmupCosine, dict(total_steps=5, min_lr_ratio=2), "min_lr_ratio must lie in 0..1, got 2"),
        (WarmupStableDecay, dict(total_steps=5, decay_share=1.5), "decay_share must lie in 0..1, got 1.5"),
        (TwoPhase, dict(total_steps=5, mid_lr_ratio=-1), "mid_lr_ratio must lie in 0..1, got -1"),
        (TwoPhase, dict(total_steps=5, shape="step"), "shape must be cosine or linear, got 'step'"),
        (TwoPhase, dict(total_steps=5, phase_1_share=0.0), "phase_1_share 0.0 of 5 steps is 0"),
        (TwoPhase, dict(total_steps=100, warmup_steps=80), "is 75, with 80 of warm-up"),
    ],
)
def test_impossible_schedules_are_refused(make, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        rates(lambda o: make(o, **bad))
