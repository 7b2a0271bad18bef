"""Rewards for many points or boxes: an optimal (Hungarian) matching of what is said with the gold, scored as F1.

The matching maximises the sum of similarities itself: moving a place nearer to its gold never lowers the reward.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from step3vl.evaluation.extract import final_text

from .base import Answered, EachAnswer, positive, share
from .grounding import Overlap, box_score, closeness, decay_kind, overlap_kind
from .places import Convention, Place, convention, gold_image, gold_places, image_size, said_places


class _Matching(EachAnswer):
    def __init__(self, count: int, coordinates: Convention, exact_count_share: float, max_places: int):
        super().__init__()
        if max_places < 1:
            raise ValueError(f"max_places is {max_places}; accepted is 1 or more")
        self._count, self.coordinates, self.max_places = count, convention(coordinates), max_places
        self.exact_count_share = share("exact_count_share", exact_count_share)

    def score(self, rollout: Answered) -> float | None:
        gold = gold_places(rollout, self._count)
        if len(gold) > self.max_places:
            self.counts["too_many_gold_places"] += 1
            return None
        if not final_text(rollout.text):
            return 0.0
        said = said_places(rollout, self._count, self.coordinates)
        value = f1(self.similarity(said[: self.max_places], gold, rollout), len(said), len(gold))
        return (1.0 - self.exact_count_share) * value + self.exact_count_share * (len(said) == len(gold))

    def similarity(self, said: list[Place], gold: list[Place], rollout: Answered) -> NDArray[np.float64]:
        raise TypeError(f"{type(self).__name__} has no similarity of two places")


class PointMatching(_Matching):
    """Counting by pointing: F1 over optimally matched points, each pair worth its closeness.

    Args:
        reach: share of the image's diagonal at which a linear closeness is 0, and an exponential one 1/e.
        decay: linear or exponential.
        coordinates: how answers write them: thousand, unit or pixels.
        exact_count_share: share of the reward that is paid for the right number of points alone.
        max_places: only so many points are matched, the others count as wrong; more gold points: not judged.
    """

    name = "point_matching"

    def __init__(
        self,
        reach: float = 0.05,
        decay: Literal["linear", "exponential"] = "linear",
        coordinates: Convention = "thousand",
        exact_count_share: float = 0.0,
        max_places: int = 200,
    ):
        super().__init__(2, coordinates, exact_count_share, max_places)
        self.reach, self.decay = positive("reach", reach), decay_kind(decay)

    def similarity(self, said: list[Place], gold: list[Place], rollout: Answered) -> NDArray[np.float64]:
        size = image_size(rollout, gold_image(rollout))
        return _table(said, gold, lambda a, b: closeness(a, b, size, self.reach, self.decay))


class BoxMatching(_Matching):
    """Detection: F1 over optimally matched boxes, each pair worth its overlap.

    Args:
        kind: iou, iou_squared or giou, as in BoxOverlap.
        min_overlap: a pair that is worth less is worth nothing.
        coordinates, exact_count_share, max_places: as in PointMatching.
    """

    name = "box_matching"

    def __init__(
        self,
        kind: Overlap = "iou",
        min_overlap: float = 0.0,
        coordinates: Convention = "thousand",
        exact_count_share: float = 0.0,
        max_places: int = 200,
    ):
        super().__init__(4, coordinates, exact_count_share, max_places)
        self.kind, self.min_overlap = overlap_kind(kind), share("min_overlap", min_overlap)

    def similarity(self, said: list[Place], gold: list[Place], rollout: Answered) -> NDArray[np.float64]:
        table = _table(said, gold, lambda a, b: box_score(a, b, self.kind))
        return np.where(table >= self.min_overlap, table, 0.0)


def f1(similarity: NDArray[np.float64], num_said: int, num_gold: int) -> float:
    """2S / (said + gold), S the largest sum of similarities [said, gold] in a one-to-one matching.

    It is F1 with precision S/said and recall S/gold. Nothing said of nothing there is 1.
    """
    from scipy.optimize import linear_sum_assignment

    if num_said == 0 or num_gold == 0:
        return float(num_said == num_gold)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return min(2.0 * float(similarity[rows, columns].sum()) / (num_said + num_gold), 1.0)


def _table(said: list[Place], gold: list[Place], worth) -> NDArray[np.float64]:
    return np.array([[worth(a, b) for b in gold] for a in said], dtype=np.float64).reshape(len(said), len(gold))
