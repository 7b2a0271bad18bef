"""Grounding: a click point, or a box, in an image.

Numbers up to 1 are shares of the image's sides. Larger ones are read by `coordinates`: on a grid of 0 to 1000, which
STEP3-VL and Qwen-VL are trained on, or in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import coordinates
from step3vl.evaluation.runner import Record

from .choice import by_group
from .hub import HubBenchmark, Row, asked, listed, picture

Scale = Literal["thousand", "pixels"]
POINT = (
    "Identify the UI element for the instruction and output exactly one click point as [x, y] in normalized "
    "coordinates within [0, 1]. Do not output a bounding box.\nInstruction: "
)
POINT_OR_NOTHING = (
    "Identify the UI target for the instruction and output exactly one click point as [x, y]. You may use either "
    "normalized coordinates in [0, 1] or absolute pixel coordinates. If the target does not exist, output [-1, -1].\n"
    "Instruction: "
)
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "


class Pointing(HubBenchmark):
    """Scores a click: is it inside the gold area?

    Args:
        data_root, num_cases: as in HubBenchmark.
        coordinates: what numbers above 1 are: "thousand" or "pixels".
    """

    def __init__(self, data_root: str, num_cases: int | None = None, coordinates: Scale = "thousand"):
        if coordinates not in ("thousand", "pixels"):
            raise ValueError(f"coordinates is {coordinates!r}; accepted are 'thousand' and 'pixels'")
        super().__init__(data_root, num_cases)
        self.coordinates = coordinates

    def shares(self, case: Case, text: str, count: int) -> tuple[float, ...] | None:
        """Coordinates as shares of the image's width and height, x before y; None: not found."""
        found = coordinates(text, count)
        if found is None:
            return None
        sides = case.gold["size"] if self.coordinates == "pixels" else (1000, 1000)
        if max(found) <= 1:
            return found
        return tuple(value / sides[i % 2] for i, value in enumerate(found))

    def score(self, case: Case, text: str) -> float:
        point = self.shares(case, text, 2)
        return float(point is not None and inside(point, case.gold["polygon"]))

    def is_readable(self, case: Case, text: str) -> bool:
        return coordinates(text, 2) is not None

    def breakdown(self, records: Sequence[Record]) -> dict[str, float]:
        return {group: float(np.mean(scores)) for group, scores in sorted(by_group(records).items())}


class ScreenSpotV2(Pointing):
    """ScreenSpot-V2 (1,272 targets on phones, desktops and web pages)."""

    repo, split = "HongxinLi/ScreenSpot_v2", "test"
    columns = ("image", "instruction", "bbox", "data_type")

    def read(self, row: Row, number: int) -> Case:
        image = picture(row["image"], row)
        x0, y0, x1, y1 = corners(listed(row["bbox"]), *image.size)
        return clicked(str(number), POINT + row["instruction"], image, (x0, y0, x1, y1), str(row["data_type"]))


class ScreenSpotPro(Pointing):
    """ScreenSpot-Pro (1,581 targets of professional programs, up to 6016 x 3384 pixels)."""

    repo, split = "TIGER-Lab/ScreenSpot-Pro", "train"
    columns = ("image", "instruction", "bbox", "ui_type", "group")

    def read(self, row: Row, number: int) -> Case:
        image = picture(row["image"], row)
        x0, y0, x1, y1 = (float(value) for value in listed(row["bbox"]))
        if max(x1, y1) > 1:
            x0, y0, x1, y1 = x0 / image.width, y0 / image.height, x1 / image.width, y1 / image.height
        return clicked(str(number), POINT + row["instruction"], image, (x0, y0, x1, y1), str(row["ui_type"]))


class OSWorldG(Pointing):
    """OSWorld-G (564 targets: boxes, polygons, and things that are not there)."""

    repo, split = "MMInstruction/OSWorld-G", "test"
    columns = ("image", "instruction", "box_type", "box_coordinates")

    def read(self, row: Row, number: int) -> Case:
        image = picture(row["image"], row)
        values, kind = [float(v) for v in listed(row["box_coordinates"])], str(row["box_type"]).lower()
        if kind == "bbox":
            x, y, width, height = values
            values = [x, y, x + width, y + height]
        elif kind not in ("polygon", "refusal"):
            raise ValueError(f"box_type is {kind!r}; accepted are bbox, polygon, refusal")
        sides = image.size
        polygon = rectangle(values) if len(values) == 4 else list(zip(values[::2], values[1::2]))
        shares = [(x / sides[0], y / sides[1]) for x, y in polygon]
        case = clicked(str(number), POINT_OR_NOTHING + row["instruction"], image, (0, 0, 0, 0), kind)
        case.gold["polygon"] = [] if kind == "refusal" else shares
        if kind == "refusal":
            case.answer = "[-1, -1]"
        else:
            case.answer = middle(shares)
        return case

    def score(self, case: Case, text: str) -> float:
        point = coordinates(text, 2)
        if case.group == "refusal":
            return float(point is not None and max(point) < 0)
        return super().score(case, text)


class RefCOCO(Pointing):
    """RefCOCO (one box for a phrase); right when intersection over union is at least one half."""

    repo, split = "lmms-lab-encoder/RefCOCO", "val"
    columns = ("image", "bbox", "answer")

    def read(self, row: Row, number: int) -> Case:
        image = picture(row["image"], row)
        x, y, width, height = (float(value) for value in listed(row["bbox"]))
        gold = (x / image.width, y / image.height, (x + width) / image.width, (y + height) / image.height)
        phrases = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        return Case(
            id=str(number),
            prompt=asked(BOX + str(phrases[0]), [image]),
            answer=f"[{', '.join(f'{1000 * value:.0f}' for value in gold)}]",
            answer_type="box",
            gold={"box": gold, "size": image.size},
        )

    def score(self, case: Case, text: str) -> float:
        box = self.shares(case, text, 4)
        return float(box is not None and overlap(box, case.gold["box"]) >= 0.5)

    def is_readable(self, case: Case, text: str) -> bool:
        return coordinates(text, 4) is not None


# ------------------------------------------------------------------------------------------------ areas


def clicked(id: str, text: str, image: Any, box: tuple[float, float, float, float], group: str) -> Case:
    """A case whose gold area is a box in shares of the image."""
    polygon = rectangle(box)
    return Case(
        id=id,
        prompt=asked(text, [image]),
        answer=middle(polygon),
        answer_type="point",
        group=group,
        gold={"polygon": polygon, "size": image.size},
    )


def rectangle(box: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of a box (x0, y0, x1, y1), whichever of its corners came first."""
    (x0, x1), (y0, y1) = sorted((box[0], box[2])), sorted((box[1], box[3]))
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def middle(polygon: Sequence[tuple[float, float]]) -> str:
    """The middle of a polygon's corners as an answer on the grid of 0 to 1000."""
    x, y = np.mean(polygon, axis=0)
    return f"[{1000 * x:.0f}, {1000 * y:.0f}]"


def corners(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """ScreenSpot-V2's boxes in shares: corners where the last two are the larger, else a corner and a size."""
    x, y, a, b = (float(value) for value in box)
    if max(x, y, a, b) <= 1 and a >= x and b >= y:
        return x, y, a, b
    if a > x and b > y:
        return x / width, y / height, a / width, b / height
    return x / width, y / height, (x + a) / width, (y + b) / height


def inside(point: Sequence[float], polygon: Sequence[tuple[float, float]]) -> bool:
    """Whether a point lies in a polygon; the edges of a box count."""
    x, y = point
    if len(polygon) == 4 and polygon == rectangle([*polygon[0], *polygon[2]]):
        return polygon[0][0] <= x <= polygon[2][0] and polygon[0][1] <= y <= polygon[2][1]
    is_in = False
    for (xa, ya), (xb, yb) in zip(polygon, [*polygon[1:], *polygon[:1]]):
        if (ya > y) != (yb > y) and x < (xb - xa) * (y - ya) / (yb - ya) + xa:
            is_in = not is_in
    return is_in


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 for an empty or inverted one."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    common = max(0.0, width) * max(0.0, height)
    return common / (sum(areas) - common) if min(areas) > 0 else 0.0
