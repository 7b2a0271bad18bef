"""Many places: optimal matching, F1, empty sets, permutations, the exact-count share and the cap."""

import itertools
import random
import time

import numpy as np
import pytest

from step3vl.rewards import BoxMatching, PointMatching
from step3vl.rewards.matching import f1
from step3vl.types import Region

from .answers import answered, one, placed


def dot(x, y):
    return (x - 5, y - 5, x + 5, y + 5)


def points(*places):
    return ", ".join(f"[{x}, {y}]" for x, y in places)


def test_f1_is_that_of_the_best_matching_of_all():
    draw = np.random.default_rng(0)
    for _ in range(200):
        rows, columns = draw.integers(1, 6, 2)
        table = draw.random((rows, columns))
        wide = table if rows <= columns else table.T
        best = max(
            sum(wide[i, j] for i, j in enumerate(picks))
            for picks in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        )
        precision, recall = best / rows, best / columns
        assert f1(table, rows, columns) == pytest.approx(2 * precision * recall / (precision + recall))
        assert f1(table, rows, columns) == pytest.approx(f1(table.T, columns, rows)), "symmetric"


def test_points_found_missed_and_invented():
    gold = [dot(100, 100), dot(500, 500), dot(900, 100)]
    said = {
        points((100, 100), (500, 500), (900, 100)): 1.0,
        points((100, 100), (500, 500)): 0.8,
        points((100, 100), (500, 500), (900, 100), (20, 900)): 6 / 7,
        points((100, 100), (100, 100), (100, 100)): 1 / 3,
        "none": 0.0,
        "": 0.0,
        "<think>" + points((100, 100), (500, 500), (900, 100)): 0.0,
    }
    assert {text: one(PointMatching(), placed(text, *gold)) for text in said} == pytest.approx(said)


def test_order_does_not_matter():
    draw = random.Random(0)
    gold = [(draw.randint(0, 1000), draw.randint(0, 1000)) for _ in range(12)]
    said = [(x + draw.randint(-40, 40), y + draw.randint(-40, 40)) for x, y in gold[:9]]
    reward = PointMatching(reach=0.05)
    values = set()
    for _ in range(10):
        draw.shuffle(gold)
        draw.shuffle(said)
        values.add(round(one(reward, placed(points(*said), *(dot(*place) for place in gold))), 9))
    assert len(values) == 1 and 0 < values.pop() < 1


def test_a_closer_pair_never_lowers_the_reward():
    draw = np.random.default_rng(1)
    for _ in range(300):
        rows, columns = draw.integers(1, 7, 2)
        table = draw.random((rows, columns))
        nearer = table.copy()
        nearer[draw.integers(rows), draw.integers(columns)] += draw.random()
        assert f1(nearer.clip(0, 1), rows, columns) >= f1(table, rows, columns) - 1e-12


def test_one_gold_is_monotone_in_the_error():
    values = [one(PointMatching(reach=0.2), placed(f"[{500 + d}, 500]", dot(500, 500))) for d in range(0, 340, 20)]
    assert values[0] == 1.0 and values[-1] == 0.0
    assert all(a > b or a == b == 0 for a, b in zip(values, values[1:]))


def test_empty_sets():
    nothing = {"answer": "0", "kind": "number"}
    for reward in (PointMatching(), BoxMatching()):
        assert one(reward, answered("none", **nothing)) == 1.0
        assert one(reward, answered("[1, 2], [1, 2, 3, 4]", **nothing)) == 0.0
        assert one(reward, answered("", **nothing)) == one(reward, answered("<think> none", **nothing)) == 0.0
        assert one(reward, answered("none", gold={"places": []})) == 1.0
        with pytest.raises(ValueError, match="c: no gold places"):
            reward([answered("[1, 2]", answer="3")])


def test_the_right_number_alone_earns_its_share_only():
    gold = [dot(100, 100), dot(500, 500)]
    reward = PointMatching(exact_count_share=0.25)
    assert one(reward, placed(points((900, 900), (900, 800)), *gold)) == pytest.approx(0.25)
    assert one(reward, placed(points((100, 100), (500, 500)), *gold)) == pytest.approx(1)
    assert one(reward, placed(points((100, 100)), *gold)) == pytest.approx(0.75 * 2 / 3)


def test_boxes():
    gold = [(0, 0, 100, 100), (500, 500, 700, 700)]
    both = "[500, 500, 700, 700] and [0, 0, 100, 50]"
    assert one(BoxMatching(), placed(both, *gold)) == pytest.approx((1 + 0.5) * 2 / 4)
    assert one(BoxMatching("iou_squared"), placed(both, *gold)) == pytest.approx((1 + 0.25) * 2 / 4)
    assert one(BoxMatching(min_overlap=0.6), placed(both, *gold)) == pytest.approx(0.5)
    assert one(BoxMatching(), placed('[{"box": [500, 500, 700, 700]}, {"box": [0, 0, 100, 100]}]', *gold)) == 1.0
    assert one(BoxMatching(), placed("[9, 9, 9, 9], [100, 100, 0, 0]", *gold)) == 0.0


def test_counted_regions_and_a_box_that_wins_over_the_text():
    rollout = placed("first [100, 100], so \\boxed{[500, 500]}", dot(500, 500), label="counted")
    assert one(PointMatching(), rollout) == 1.0
    mixed = answered(
        "[500, 500]", regions=[Region(label="counted", box=dot(500, 500)), Region(label="cat", box=(1, 1, 2, 2))]
    )
    assert one(PointMatching(), mixed) == 1.0, "other regions are no golds"


def test_a_flood_of_points_is_cheap_and_poor():
    gold = [dot(10 * k, 10 * k) for k in range(200)]
    flood = points(*((x, y) for x in range(0, 1000, 25) for y in range(0, 1000, 25)))
    reward = PointMatching(reach=0.5)
    reward([placed("[1, 2]", dot(1, 2))])  # scipy is imported
    start = time.process_time()
    value = one(reward, placed(flood, *gold))
    assert time.process_time() - start < 1.0
    assert 0 < value <= 2 * 200 / (1600 + 200)
    assert one(reward, placed(flood, *gold, dot(1, 1))) is None and reward.counts["too_many_gold_places"] == 1


def test_refusals():
    with pytest.raises(ValueError, match=r"exact_count_share is 1\.5"):
        PointMatching(exact_count_share=1.5)
    with pytest.raises(ValueError, match="max_places is 0"):
        BoxMatching(max_places=0)
    with pytest.raises(ValueError, match="gold\\['places'\\] holds 2 numbers"):
        BoxMatching()([answered("[1, 2, 3, 4]", gold={"places": [(0.1, 0.2)]})])
