"""Scenes of coloured shapes, shared by the grounding, question-answering and image-to-code generators."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from step3vl.data.corpus.draft import held_out_pair
from step3vl.data.corpus.draw import (
    CELL,
    COLOURS,
    GRID,
    RGB,
    SHAPES,
    canvas,
    cell_box,
    dim,
    draw_shape,
    jitter,
    weather,
)
from step3vl.types import Region

Pair = tuple[str, str]
SIDES = {0: 64, 1: 64, 2: 112, 3: 224, 4: 448}
SIZES = {0: (14, 14), 1: (12, 12), 2: (14, 26), 3: (16, 36), 4: (18, 56)}


@dataclass(slots=True)
class Item:
    """A shape in a scene and the box (pixels, x1 and y1 exclusive) that it fills."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def held_out(self) -> bool:
        return is_held_out(self.shape, self.colour)

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def region(self, label: str | None = None, image: int = 0) -> Region:
        return Region(label=label or self.name, box=self.box, image=image)


def is_held_out(shape: str, colour: str) -> bool:
    return held_out_pair(SHAPES.index(shape), COLOURS.index(colour))


def pairs(held_out: bool) -> list[Pair]:
    """(shape, colour) pairs: those training may show, or those it never does."""
    return [(s, c) for s in SHAPES for c in COLOURS if is_held_out(s, c) == held_out]


def all_pairs(held_out: bool) -> list[Pair]:
    """Pairs that a scene of one side of the split may show: held-out scenes show every pair."""
    return pairs(False) + (pairs(True) if held_out else [])


def distinct_pairs(rng: random.Random, num: int, held_out: bool, num_held_out: int = 1) -> list[Pair]:
    """`num` (at most 7) pairs that share neither shape nor colour.

    In held-out scenes the first `num_held_out` pairs are held-out ones; in training none is.
    """
    while True:
        shapes, colours = rng.sample(SHAPES, num), rng.sample(COLOURS, num)
        chosen = list(zip(shapes, colours))
        flags = [is_held_out(*pair) for pair in chosen]
        if not held_out and not any(flags):
            return chosen
        if held_out and sum(flags) >= num_held_out:
            return sorted(chosen, key=lambda pair: not is_held_out(*pair))


def place(rng: random.Random, chosen: Sequence[Pair], level: int) -> tuple[Image.Image, list[Item]]:
    """Draw the pairs, in the order given, at places that do not overlap. The canvas and sizes follow the level."""
    if level <= 1:
        image = canvas()
        cells = rng.sample(range(GRID * GRID), len(chosen))
        items = [Item(s, c, _in_cell(rng, cell, level)) for (s, c), cell in zip(chosen, cells)]
    else:
        side = SIDES[level] + rng.choice((-16, 0, 16)) * (level == 2) + rng.choice((0, 32)) * (level > 2)
        image = canvas(side if level < 4 else rng.choice((side, 640)), side, dim(rng))
        boxes = free_boxes(rng, image, len(chosen), SIZES[level])
        items = [Item(s, c, box) for (s, c), box in zip(chosen, boxes)]
    for item in items:
        draw_shape(image, item.shape, RGB[item.colour], item.box)
    return (weather(image, rng) if level == 4 else image), items


def _in_cell(rng: random.Random, cell: int, level: int) -> tuple[int, int, int, int]:
    """In the middle of its cell, or, at level 1, two pixels off at most: still wholly inside it."""
    x, y, _, _ = cell_box(cell // GRID, cell % GRID)
    dx, dy = jitter(rng, level)
    size = SIZES[level][0]
    x, y = x + dx + (CELL - size) // 2, y + dy + (CELL - size) // 2
    return x, y, x + size, y + size


def free_boxes(
    rng: random.Random, image: Image.Image, num: int, sizes: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """`num` square boxes, two pixels or more apart; sizes shrink when the image is crowded."""
    low, high = sizes
    boxes: list[tuple[int, int, int, int]] = []
    tries = 0
    while len(boxes) < num:
        size = rng.randint(low, high)
        x, y = rng.randint(1, image.width - size - 1), rng.randint(1, image.height - size - 1)
        new = (x, y, x + size, y + size)
        if all(new[2] + 2 <= b[0] or b[2] + 2 <= new[0] or new[3] + 2 <= b[1] or b[3] + 2 <= new[1] for b in boxes):
            boxes.append(new)
        tries += 1
        if tries % 200 == 0:
            high = max(low, high - 4)
        if tries % 1000 == 0:
            boxes.clear()
    return boxes
