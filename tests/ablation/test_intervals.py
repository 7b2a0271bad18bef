"""Intervals cover what they should, pairing takes shared noise away, and steps are counted as they were logged."""

import json

import numpy as np
import pytest

from step3vl.ablation.intervals import (
    final_loss,
    interval,
    mean_interval,
    overlap,
    read_scores,
    sign_test,
    steps_to,
)


def test_interval_of_a_constant_has_no_width():
    found = interval(np.full((3, 50), 0.7))
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, 0.7, 0.7))
    assert (found.num_seeds, found.num_cases) == (3, 50)


def test_width_is_that_of_the_two_way_model():
    """scores = seed + case + noise: the variance of the mean is the sum of the three parts over their numbers."""
    rng = np.random.default_rng(1)
    num_seeds, num_cases = 40, 60
    spread = {"seed": 0.3, "case": 0.5, "noise": 0.4}
    data = (
        rng.normal(0, spread["seed"], (num_seeds, 1))
        + rng.normal(0, spread["case"], (1, num_cases))
        + rng.normal(0, spread["noise"], (num_seeds, num_cases))
    )
    found = interval(data)
    expected = np.sqrt(0.3**2 / num_seeds + 0.5**2 / num_cases + 0.4**2 / (num_seeds * num_cases))
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(expected, rel=0.2)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        data = rng.normal(0, 0.3, (8, 1)) + rng.normal(0, 1, (1, 60)) + rng.normal(0, 0.5, (8, 60))
        found = interval(data, seed=trial)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 1.0


def test_pairing_removes_what_two_rows_share():
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 2, (3, 200)).astype(float)
    better = np.clip(shared + (rng.random((3, 200)) < 0.05), 0, 1)
    paired = interval(better - shared)
    assert paired.low > 0 and paired.high < 0.1
    assert interval(better).high - interval(better).low > paired.high - paired.low


def test_mean_over_capabilities_weighs_them_alike():
    found = mean_interval([np.ones((2, 10)), np.zeros((2, 1000))])
    assert found.mean == pytest.approx(0.5) and found.num_cases == 1010
    with pytest.raises(ValueError, match="same seeds"):
        mean_interval([np.ones((2, 10)), np.ones((3, 10))])
    with pytest.raises(ValueError, match="same seeds"):
        mean_interval([])


def test_sign_test_by_hand():
    assert sign_test([0.1, 0.2, 0.3], 1) == (3, pytest.approx(0.125))
    assert sign_test([0.1, -0.2, 0.3], 1) == (2, pytest.approx(0.5))
    assert sign_test([0.1, 0.2, 0.3], -1) == (0, pytest.approx(1.0))
    assert sign_test([0.0, 0.0], 1) == (1, pytest.approx(0.75))


def test_steps_to_a_loss():
    steps, losses = np.arange(4, 100, 5), np.linspace(2.0, 0.1, 20)
    level = float(losses[:7].mean())
    assert steps_to((steps, losses), level) == steps[6] + 1
    assert np.isnan(steps_to((steps, losses), 0.05))
    assert np.isnan(steps_to((steps[:3], losses[:3]), 5.0))
    assert final_loss((steps, losses)) == pytest.approx(losses[-2:].mean())


def test_scores_are_read_case_by_case(tmp_path):
    records = [
        {"benchmark": "a", "id": "1", "score": 1.0, "blind_score": 0.0},
        {"benchmark": "a", "id": "1", "score": 0.0, "blind_score": 0.0},
        {"benchmark": "a", "id": "2", "score": 1.0, "blind_score": None},
    ]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_scores(tmp_path) == {"a": {"1": (0.5, 0.0), "2": (1.0, None)}}
    with pytest.raises(ValueError, match="is missing"):
        read_scores(tmp_path / "nowhere")
    assert overlap([["a", "b", "c"], ["c", "a"]]) == ["a", "c"]
