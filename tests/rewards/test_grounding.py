"""Boxes, points and clicks: known values, bounds, symmetry, falling with the error, and boxes that are none."""

import math
import random

import pytest

from step3vl.rewards import BoxOverlap, Click, EuclideanPoint, GaussianPoint
from step3vl.rewards.grounding import box_score, giou

from .answers import answered, one, placed

SQUARES = [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1.0, 1.0),
    ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, -0.079365),
    ((0, 0, 1, 1), (2, 2, 3, 3), 0.0, -0.777778),
    ((0, 0, 10, 10), (2, 2, 4, 4), 0.04, 0.04),
]
KINDS = ("iou", "iou_squared", "giou")


def boxes(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        x0, y0 = draw.uniform(0, 900), draw.uniform(0, 900)
        yield x0, y0, x0 + draw.uniform(1, 100), y0 + draw.uniform(1, 100)


@pytest.mark.parametrize(("a", "b", "iou", "generalised"), SQUARES)
def test_known_overlaps(a, b, iou, generalised):
    assert giou(a, b) == pytest.approx(generalised, abs=1e-6)
    assert box_score(a, b, "iou") == pytest.approx(iou)
    assert box_score(a, b, "iou_squared") == pytest.approx(iou**2)
    assert box_score(a, b, "giou") == pytest.approx((1 + generalised) / 2, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_is_symmetric_bounded_and_one_only_for_equals(kind):
    pairs = list(zip(boxes(500, 1), boxes(500, 2)))
    for a, b in pairs:
        assert 0.0 <= box_score(a, b, kind) < 1.0 and box_score(a, b, kind) == pytest.approx(box_score(b, a, kind))
        assert box_score(a, a, kind) == pytest.approx(1.0)
        stretched = [tuple(v * (3 if i % 2 else 0.5) for i, v in enumerate(box)) for box in (a, b)]
        assert box_score(*stretched, kind) == pytest.approx(box_score(a, b, kind)), "blind to units of the axes"


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_falls_as_the_box_slides_away(kind):
    gold = (100, 100, 200, 200)
    values = [one(BoxOverlap(kind), placed(f"[{100 + k}, 100, {200 + k}, 200]", gold)) for k in range(0, 100, 5)]
    assert values[0] == 1.0 and all(a > b for a, b in zip(values, values[1:]))
    far = [one(BoxOverlap(kind), placed(f"[{300 + k}, 100, {400 + k}, 200]", gold)) for k in (0, 200, 400)]
    assert (far[0] > far[1] > far[2] > 0) if kind == "giou" else far == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "said",
    [
        "[5, 5, 5, 5]",
        "[5, 5, 9, 5]",
        "[200, 200, 100, 100]",
        "[100, 200, 200, 100]",
        "",
        "none",
        "[1, 2]",
        "<think>[100, 100, 200, 200]",
    ],
)
def test_what_is_no_box_earns_nothing(kind, said):
    assert one(BoxOverlap(kind), placed(said, (100, 100, 200, 200))) == 0.0


def test_gold_without_area_is_never_hit_by_a_box():
    assert [one(BoxOverlap(kind), placed("[5, 5, 9, 9]", (5, 5, 5, 5))) for kind in KINDS] == [0, 0, 0]


@pytest.mark.parametrize(
    ("coordinates", "box", "point"),
    [
        ("thousand", "[250, 500, 500, 750]", "[375, 625]"),
        ("unit", "[0.25, 0.5, 0.5, 0.75]", "[0.375, 0.625]"),
        ("pixels", "[100, 100, 200, 150]", "[150, 125]"),
    ],
)
def test_coordinates_are_read_as_set_and_never_guessed(coordinates, box, point):
    gold, size = (100, 100, 200, 150), (400, 200)
    assert one(BoxOverlap("iou", coordinates), placed(box, gold, size=size)) == pytest.approx(1)
    for reward in (Click, GaussianPoint, EuclideanPoint):
        assert one(reward(coordinates=coordinates), placed(point, gold, size=size)) == pytest.approx(1)
        others = [c for c in ("thousand", "unit", "pixels") if c != coordinates]
        assert all(one(reward(coordinates=c), placed(point, gold, size=size)) < 0.9 for c in others)
    tiny = placed("[0.5, 0.5]", (500, 500, 600, 600))
    assert one(Click("thousand"), tiny) == 0.0, "numbers below 1 are thousandths all the same"


def test_golds_of_published_benchmarks_are_shares():
    box = {"box": (0.25, 0.5, 0.5, 0.75), "size": (400, 200)}
    assert one(BoxOverlap(), answered("[250, 500, 500, 750]", gold=box, size=None)) == pytest.approx(1)
    triangle = {"polygon": [(0, 0), (1, 0), (0, 1)], "size": (400, 200)}
    said = {"[100, 100]": 1.0, "[900, 900]": 0.0}
    assert {text: one(Click(), answered(text, gold=triangle, size=None)) for text in said} == said


def test_gaussian_follows_the_box():
    gold = (100, 100, 300, 200)
    assert one(GaussianPoint(), placed("[200, 150]", gold)) == 1.0
    for border in ("[300, 150]", "[100, 150]", "[200, 100]", "[200, 200]"):
        assert one(GaussianPoint(), placed(border, gold)) == pytest.approx(math.exp(-0.5))
    assert one(GaussianPoint(0.25), placed("[300, 150]", gold)) == pytest.approx(math.exp(-2))
    assert 0 < one(GaussianPoint(), placed("[200, 151]", (200, 150, 200, 150))) < 1, "a point as gold"


@pytest.mark.parametrize("reward", [GaussianPoint(), EuclideanPoint(), EuclideanPoint(decay="linear", reach=0.5)])
def test_points_fall_with_the_distance_in_every_direction(reward):
    draw = random.Random(3)
    for _ in range(100):
        angle = draw.uniform(0, 2 * math.pi)
        said = [f"({500 + r * math.cos(angle):.3f}, {500 + r * math.sin(angle):.3f})" for r in (0, 20, 40, 80, 160)]
        values = reward([placed(text, (450, 450, 550, 550)) for text in said])
        assert values[0] == pytest.approx(1, abs=1e-5) and all(0 <= b < a <= 1 for a, b in zip(values, values[1:]))


def test_euclidean_is_in_diagonals():
    rollout = placed("[100, 0]", (0, 0, 0, 0), size=(300, 400))  # 30 pixels of a diagonal of 500
    assert one(EuclideanPoint(0.1), rollout) == pytest.approx(math.exp(-0.6))
    assert one(EuclideanPoint(0.1, "linear"), rollout) == pytest.approx(0.4)
    assert one(EuclideanPoint(0.05, "linear"), rollout) == 0.0


def test_click_counts_the_borders():
    gold = (100, 100, 300, 200)
    said = {
        "[100, 100]": 1,
        "[300, 200]": 1,
        "[99.9, 150]": 0,
        "[300.1, 150]": 0,
        "[200, 99]": 0,
        "[200, 201]": 0,
        "x": 0,
    }
    assert {text: one(Click(), placed(text, gold)) for text in said} == said


def test_places_that_no_image_holds_are_wrong_and_harmless():
    for reward in (BoxOverlap(), BoxOverlap("giou"), Click(), GaussianPoint(), EuclideanPoint()):
        for text in ("[1e300, 1e300]", "[-1e300, 0, 1e300, 1e308]", "[1e999, 5]"):
            assert 0.0 <= one(reward, placed(text, (1, 1, 9, 9))) <= (0.5 if reward.name == "box_overlap" else 1e-3)


def test_the_whole_image_is_worth_its_overlap_and_half_to_giou():
    """Known and documented: with giou a policy can live from boxes that hold everything, so the cards take iou."""
    everything = placed("[0, 0, 1000, 1000]", (100, 100, 110, 110))
    assert one(BoxOverlap("iou"), everything) == pytest.approx(1e-4)
    assert one(BoxOverlap("giou"), everything) == pytest.approx(0.50005)


def test_refusals_name_key_and_case():
    with pytest.raises(ValueError, match="coordinates is 'auto'; accepted are thousand, unit and pixels"):
        Click("auto")
    with pytest.raises(ValueError, match="kind is 'diou'"):
        BoxOverlap("diou")
    with pytest.raises(ValueError, match="sigma_ratio is 0"):
        GaussianPoint(0)
    with pytest.raises(ValueError, match="decay is 'cubic'"):
        EuclideanPoint(decay="cubic")
    with pytest.raises(ValueError, match="c: no gold place"):
        Click()([answered("[1, 2]")])
    with pytest.raises(ValueError, match="neither image 0 nor"):
        Click()([placed("[1, 2]", (0, 0, 1, 1), size=None)])
