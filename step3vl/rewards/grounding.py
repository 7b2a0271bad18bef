"""Rewards for one box, one point and one click (report: IoU for grounding, Euclidean distance for pointing).

What cannot be read, and an empty or inverted box, earns 0. Coordinates are read by the convention that is set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from step3vl.evaluation.benchmarks.pointing import inside, overlap

from .base import Answered, EachAnswer, positive
from .places import Convention, convention, gold_box, gold_image, image_size, middle, said_place

Overlap = Literal["iou", "iou_squared", "giou"]
OVERLAPS = ("iou", "iou_squared", "giou")


class BoxOverlap(EachAnswer):
    """How well the box that is said covers the gold box, 0 to 1.

    Args:
        kind: iou; iou_squared, which pays for the last percents (Perception-R1's code); giou mapped to 0 to 1, which
            also tells boxes that miss how far they miss, but pays half for the whole image.
        coordinates: how answers write them: thousand, unit or pixels.
    """

    name = "box_overlap"

    def __init__(self, kind: Overlap = "iou", coordinates: Convention = "thousand"):
        super().__init__()
        self.kind, self.coordinates = overlap_kind(kind), convention(coordinates)

    def score(self, rollout: Answered) -> float:
        gold, said = gold_box(rollout), said_place(rollout, 4, self.coordinates)
        return 0.0 if said is None else box_score(said, gold, self.kind)


class GaussianPoint(EachAnswer):
    """exp(-z^2/2) of the distance to the gold box's middle, in standard deviations that are a share of its sides.

    GUI-G2's point reward: a wide target forgives more. At the middle of a border it is 0.607 for `sigma_ratio` 0.5.

    Args:
        sigma_ratio: standard deviation as a share of the gold box's width and height; at least one pixel.
        coordinates: how answers write them: thousand, unit or pixels.
    """

    name = "gaussian_point"

    def __init__(self, sigma_ratio: float = 0.5, coordinates: Convention = "thousand"):
        super().__init__()
        self.sigma_ratio, self.coordinates = positive("sigma_ratio", sigma_ratio), convention(coordinates)

    def score(self, rollout: Answered) -> float:
        gold, said = gold_box(rollout), said_place(rollout, 2, self.coordinates)
        if said is None:
            return 0.0
        x, y = middle(gold)
        across = (said[0] - x) / max(self.sigma_ratio * (gold[2] - gold[0]), 1.0)
        down = (said[1] - y) / max(self.sigma_ratio * (gold[3] - gold[1]), 1.0)
        return math.exp(-0.5 * (across**2 + down**2))


class EuclideanPoint(EachAnswer):
    """Falls with the distance to the gold box's middle, as a share of the image's diagonal, whatever the box's size.

    Args:
        reach: that share at which a linear decay is 0, and an exponential one 1/e.
        decay: linear: max(0, 1 - d/reach). exponential: exp(-d/reach).
        coordinates: how answers write them: thousand, unit or pixels.
    """

    name = "euclidean_point"

    def __init__(
        self,
        reach: float = 0.1,
        decay: Literal["linear", "exponential"] = "exponential",
        coordinates: Convention = "thousand",
    ):
        super().__init__()
        self.reach, self.decay = positive("reach", reach), decay_kind(decay)
        self.coordinates = convention(coordinates)

    def score(self, rollout: Answered) -> float:
        gold, said = gold_box(rollout), said_place(rollout, 2, self.coordinates)
        if said is None:
            return 0.0
        return closeness(said, middle(gold), image_size(rollout, gold_image(rollout)), self.reach, self.decay)


class Click(EachAnswer):
    """1 where the point lies in the gold area, borders included, else 0 (ScreenSpot's rule).

    Args:
        coordinates: how answers write them: thousand, unit or pixels.
    """

    name = "click"

    def __init__(self, coordinates: Convention = "thousand"):
        super().__init__()
        self.coordinates = convention(coordinates)

    def score(self, rollout: Answered) -> float:
        gold, said = gold_box(rollout), said_place(rollout, 2, self.coordinates)
        if said is None or not (gold[0] <= said[0] <= gold[2] and gold[1] <= said[1] <= gold[3]):
            return 0.0
        polygon = rollout.case.gold.get("polygon")
        if polygon and not any(region.label == "answer" for region in rollout.case.regions):
            width, height = image_size(rollout)
            return float(inside(said, [(x * width, y * height) for x, y in polygon]))
        return 1.0


# ------------------------------------------------------------------------------------------------ geometry


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """Generalised IoU of two boxes with area, above -1 to 1: IoU minus the share of their hull that neither covers."""
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common
    return common / union - (hull - union) / hull


def box_score(said: Sequence[float], gold: Sequence[float], kind: str) -> float:
    """0 to 1 for two boxes; 0 for one without area."""
    if min(said[2] - said[0], said[3] - said[1], gold[2] - gold[0], gold[3] - gold[1]) <= 0:
        return 0.0
    if kind == "giou":
        return min(max((1.0 + giou(said, gold)) / 2.0, 0.0), 1.0)
    value = min(overlap(said, gold), 1.0)
    return value**2 if kind == "iou_squared" else value


def closeness(
    said: Sequence[float], gold: Sequence[float], size: tuple[float, float], reach: float, decay: str
) -> float:
    """1 at no distance between two points, falling with it as a share of the diagonal of `size`."""
    distance = math.dist(said, gold) / math.hypot(*size)
    return max(0.0, 1.0 - distance / reach) if decay == "linear" else math.exp(-distance / reach)


def overlap_kind(kind: str) -> str:
    """`kind` if it is one. Raises ValueError naming the accepted ones otherwise."""
    if kind not in OVERLAPS:
        raise ValueError(f"kind is {kind!r}; accepted are {', '.join(OVERLAPS)}")
    return kind


def decay_kind(decay: str) -> str:
    """`decay` if it is one. Raises ValueError naming the accepted ones otherwise."""
    if decay not in ("linear", "exponential"):
        raise ValueError(f"decay is {decay!r}; accepted are linear and exponential")
    return decay
