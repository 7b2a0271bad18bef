"""Grounding and counting: point to a shape, box it, count by colour or form. Coordinates are thousandths of the image.

Held out: shape and colour pairs. Every held-out question is about, or (for counts) shows, a pair training never does.
"""

from __future__ import annotations

import random

from step3vl.data.corpus.assets import font_names
from step3vl.data.corpus.draft import Draft, Subset, Turn, box_text, point_text, sample_turns
from step3vl.data.corpus.draw import (
    CELL,
    COLOURS,
    RGB,
    SHAPES,
    canvas,
    cell_box,
    dim,
    draw_shape,
    glyph_mask,
    weather,
)
from step3vl.data.corpus.scene import SIDES, SIZES, Item, all_pairs, free_boxes, pairs, place
from step3vl.types import Region


def _unique_scene(rng: random.Random, num: int, held_out: bool) -> list[tuple[str, str]]:
    """Distinct (shape, colour) pairs; in held-out scenes the first half at least are held-out pairs."""
    if not held_out:
        return rng.sample(pairs(False), num)
    first = rng.sample(pairs(True), min(7, (num + 1) // 2))
    return first + rng.sample(pairs(False), num - len(first))


def _asked(rng: random.Random, items: list[Item], held_out: bool, turns: int) -> list[Item]:
    return sample_turns(rng, [item for item in items if item.held_out == held_out], turns)


def _others(items: list[Item], item: Item) -> list[Region]:
    return [item.region("answer")] + [other.region() for other in items if other is not item]


def point(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "Point to the red circle." -> the centre of its box (at level 0 of its cell)."""
    num = rng.randint(*{0: (3, 6), 1: (3, 6), 2: (4, 8), 3: (8, 14), 4: (14, 30)}[level])
    image, items = place(rng, _unique_scene(rng, num, held_out), level)
    if level == 0:
        for item in items:
            item.box = cell_box(item.box[1] // CELL, item.box[0] // CELL)
    return Draft(
        turns=[
            Turn(
                question=f"Point to the {item.name}.",
                answer_text=point_text(item.box, image),
                answer_type="point",
                regions=_others(items, item),
            )
            for item in _asked(rng, items, held_out, turns)
        ],
        images=[image],
    )


def box(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "Box the red circle." -> [x0, y0, x1, y1]."""
    num = rng.randint(*{1: (3, 6), 2: (4, 8), 3: (8, 14), 4: (14, 30)}[level])
    image, items = place(rng, _unique_scene(rng, num, held_out), level)
    return Draft(
        turns=[
            Turn(
                question=f"Box the {item.name}.",
                answer_text=box_text(item.box, image),
                answer_type="box",
                regions=_others(items, item),
            )
            for item in _asked(rng, items, held_out, turns)
        ],
        images=[image],
    )


# ------------------------------------------------------------------------------------------------ counting


def count(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "How many red shapes?" The answer to the last turn is drawn first, so that 0..6 (level 4: 0..12) are alike."""
    most_asked, most_others = {0: (6, 6), 1: (6, 6), 2: (6, 6), 3: (9, 9), 4: (12, 20)}[level]
    target = rng.randint(0, most_asked)
    attribute = rng.choice((*SHAPES, *COLOURS))
    allowed = all_pairs(held_out)
    wanted = [pair for pair in allowed if attribute in pair]
    unwanted = [pair for pair in allowed if attribute not in pair]
    palette = rng.sample(unwanted, 4)  # few kinds, so that they repeat
    chosen = [rng.choice(wanted) for _ in range(target)]
    chosen += [rng.choice(palette) for _ in range(rng.randint(max(0, 2 - target), most_others))]
    if held_out and not set(chosen) & set(pairs(True)):
        chosen.append(rng.choice([pair for pair in unwanted if pair in pairs(True)]))
    rng.shuffle(chosen)
    image, items = place(rng, chosen, level)

    last = _count_turn(attribute, items)
    by_answer: dict[str, list[Turn]] = {}
    for other in (*SHAPES, *COLOURS):
        if other != attribute:
            turn = _count_turn(other, items)
            by_answer.setdefault(turn.answer_text, []).append(turn)
    earlier: list[Turn] = []
    while len(earlier) < turns - 1 and any(by_answer.values()):  # one of each answer before a second of any
        groups = [group for group in by_answer.values() if group]
        rng.shuffle(groups)
        earlier += [group.pop(rng.randrange(len(group))) for group in groups[: turns - 1 - len(earlier)]]
    return Draft(turns=[*earlier, last], images=[image])


def _count_turn(attribute: str, items: list[Item]) -> Turn:
    found = [item for item in items if attribute in (item.shape, item.colour)]
    kind = "red shapes".replace("red", attribute) if attribute in COLOURS else _plural(attribute)
    regions = [item.region("counted") for item in found]
    return Turn(question=f"How many {kind}?", answer_text=str(len(found)), answer_type="number", regions=regions)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


# ------------------------------------------------------------------------------------------------ characters


def letter(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "Point to the letter K." among letters, digits and, from level 3, shapes. Held out: fonts."""
    side = SIDES[level]
    image = canvas(side, colour=dim(rng))
    num = {2: 8, 3: 16, 4: 30}[level]
    characters = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", num)
    low, high = SIZES[level]
    boxes = free_boxes(rng, image, num + (level > 2) * num // 3, (low - 2, high - 2))
    for place_box in boxes[num:]:
        draw_shape(image, rng.choice(SHAPES), RGB[rng.choice(COLOURS)], place_box)
    regions = []
    for character, (x0, y0, x1, y1) in zip(characters, boxes):
        name = rng.choice(font_names(held_out, letters_only=True))
        mask = glyph_mask(character, name, y1 - y0, x1 - x0)
        ink = tuple(rng.randint(150, 255) for _ in range(3))
        image.paste(ink, (x0, y0, x0 + mask.width, y1), mask)  # type: ignore[arg-type]
        regions.append(Region(label=character, box=(x0, y0, x0 + mask.width, y1)))
    if level == 4:
        image = weather(image, rng)
    possible = []
    for region in regions:
        kind = "digit" if region.label.isdigit() else "letter"
        possible.append(
            Turn(
                question=f"Point to the {kind} {region.label}.",
                answer_text=point_text(region.box, image),
                answer_type="point",
                regions=[Region(label="answer", box=region.box)] + [other for other in regions if other is not region],
            )
        )
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


SUBSETS = {
    "point": Subset(point, (0, 1, 2, 3, 4)),
    "box": Subset(box, (1, 2, 3, 4)),
    "count": Subset(count, (0, 1, 2, 3, 4)),
    "letter": Subset(letter, (2, 3, 4)),
}
