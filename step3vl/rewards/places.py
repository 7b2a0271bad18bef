"""Where answers and golds point to, in pixels of the image. How an answer writes coordinates is said, never guessed.

A guess ("above 1, so they are thousandths") misreads answers near the origin, and a policy learns to live there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from step3vl.evaluation.extract import TAIL, boxed, coordinates, final_text

from .base import Answered

Convention = Literal["thousand", "unit", "pixels"]
"""thousand: 0 to 1000 of width and height (STEP3-VL, Qwen-VL). unit: 0 to 1 of them. pixels: as they are."""
Place = tuple[float, ...]
"""(x, y) or (x0, y0, x1, y1) in pixels."""

_GROUP = re.compile(r"[(\[<{]([^()\[\]<>{}]*)[)\]>}]")
_FAR = 1e6
"""Sides of the image; what lies further out is moved to here, so that no arithmetic overflows."""


def convention(value: str) -> str:
    """`value` if it is a convention. Raises ValueError naming the accepted ones otherwise."""
    if value not in ("thousand", "unit", "pixels"):
        raise ValueError(f"coordinates is {value!r}; accepted are thousand, unit and pixels")
    return value


def image_size(rollout: Answered, image: int = 0) -> tuple[float, float]:
    """Width and height in pixels. Raises ValueError where the case tells neither an image nor a size."""
    for images in (rollout.case.prompt.images, rollout.prompt.images):
        if image < len(images):
            return float(images[image].width), float(images[image].height)
    if "size" in rollout.case.gold:
        width, height = rollout.case.gold["size"]
        return float(width), float(height)
    raise ValueError(f"{rollout.case.id}: there is neither image {image} nor gold['size'] to measure coordinates by")


def to_pixels(place: Place, size: tuple[float, float], coordinates: str) -> Place:
    """A place written in `coordinates` as pixels of an image of `size`."""
    spans = {"thousand": (1000.0, 1000.0), "unit": (1.0, 1.0), "pixels": size}[coordinates]
    shares = [min(max(value / spans[i % 2], -_FAR), _FAR) for i, value in enumerate(place)]
    return tuple(value * size[i % 2] for i, value in enumerate(shares))


def said_place(rollout: Answered, count: int, convention: str) -> Place | None:
    """The last group of `count` numbers in the answer, in pixels; None: there is none."""
    found = coordinates(rollout.text, count)
    return None if found is None else to_pixels(found, image_size(rollout, gold_image(rollout)), convention)


def said_places(rollout: Answered, count: int, convention: str) -> list[Place]:
    """Every group of `count` numbers in brackets in the final text (in its last box, if that has any), in pixels."""
    text = final_text(rollout.text)[-TAIL:]
    box = boxed(text)
    size = image_size(rollout, gold_image(rollout))
    for part in (box, text):
        if part and (found := [place for group in _GROUP.finditer(part) if (place := _numbers(group[0], count))]):
            return [to_pixels(place, size, convention) for place in found]
    return []


def _numbers(group: str, count: int) -> Place | None:
    place = coordinates(group, count) if len(group) < 200 else None
    return place if place is not None and all(map(math.isfinite, place)) else None


# ------------------------------------------------------------------------------------------------ golds


def gold_image(rollout: Answered) -> int:
    """Number of the image that the gold lies in."""
    return next((region.image for region in rollout.case.regions if region.label in GOLD_LABELS), 0)


GOLD_LABELS = ("answer", "counted")
"""Labels of the regions that are asked for: the one place, or all that are to be counted."""


def gold_box(rollout: Answered) -> Place:
    """The gold area's box in pixels: region "answer", gold["box"] or the bounds of gold["polygon"] (shares both)."""
    case = rollout.case
    region = next((region for region in case.regions if region.label == "answer"), None)
    if region is not None:
        box: Sequence[float] = region.box
    elif case.gold.get("box"):
        box = to_pixels(tuple(case.gold["box"]), image_size(rollout), "unit")
    elif case.gold.get("polygon"):
        xs, ys = zip(*case.gold["polygon"])
        box = to_pixels((min(xs), min(ys), max(xs), max(ys)), image_size(rollout), "unit")
    else:
        raise ValueError(f"{case.id}: no gold place; needed is a region 'answer', gold['box'] or gold['polygon']")
    x0, y0, x1, y1 = box
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def gold_places(rollout: Answered, count: int) -> list[Place]:
    """All gold places in pixels: gold["places"] (shares; may be empty), else the regions to be counted.

    Points are the middles of boxes. No region at all is right only for a case whose answer is 0 or none.
    """
    case = rollout.case
    if "places" in case.gold:
        size = image_size(rollout)
        places = [to_pixels(tuple(place), size, "unit") for place in case.gold["places"]]
        if wrong := next((place for place in places if len(place) not in (2, 4) or len(place) < count), None):
            raise ValueError(f"{case.id}: gold['places'] holds {len(wrong)} numbers in a place; accepted are 2 or 4")
    else:
        places = [tuple(map(float, region.box)) for region in case.regions if region.label in GOLD_LABELS]
        if not places and case.answer.strip().lower() not in ("0", "none", "[]"):
            raise ValueError(f"{case.id}: no gold places; needed are regions 'answer' or 'counted', or gold['places']")
    return [middle(place) if count == 2 else place for place in places]


def middle(place: Place) -> Place:
    """The middle of a box; a point is its own."""
    return ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2) if len(place) == 4 else place
