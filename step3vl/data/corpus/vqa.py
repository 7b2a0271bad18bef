"""Questions about scenes of shapes: attributes, left and right, comparison, multiple choice.

Held out: shape and colour pairs. Every held-out question names a pair training never shows, or is about one.
"""

from __future__ import annotations

import random

from step3vl.data.corpus.draft import Draft, Subset, Turn, letter_question, sample_turns, yes_no
from step3vl.data.corpus.draw import COLOURS, SHAPES
from step3vl.data.corpus.scene import Item, all_pairs, distinct_pairs, pairs, place
from step3vl.data.corpus.vqa_more import chart, images, maze


def attributes(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "What shape is red?" and "What colour is the circle?" Shapes and colours are unique in the scene."""
    num = {0: rng.randint(3, 6), 1: rng.randint(3, 6), 2: rng.randint(4, 7), 3: 7}[level]
    image, items = place(rng, distinct_pairs(rng, num, held_out), level)
    possible = []
    for item in items:
        if item.held_out == held_out:
            one = [item.region("answer")]
            if rng.random() < 0.5:  # one question an item, or an earlier answer would give a later one away
                question, answer = f"What shape is {item.colour}?", item.shape
            else:
                question, answer = f"What colour is the {item.shape}?", item.colour
            possible.append(Turn(question=question, answer_text=answer, answer_type="exact", regions=one))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


RELATIONS = ("left of", "right of", "above", "below")


def holds(relation: str, a: Item, b: Item) -> bool:
    """Whether `a` is left of / right of / above / below `b`, by centres."""
    (ax, ay), (bx, by) = a.centre, b.centre
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


def spatial(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "Is the red circle left of the blue square?" Yes and no are equally likely in every turn.

    Level 0 asks about neighbours in neither row nor column doubt: centres differ by a cell or more on the asked axis.
    """
    num = {0: rng.randint(2, 4), 1: rng.randint(3, 5), 2: rng.randint(4, 6), 3: 7}[level]
    image, items = place(rng, distinct_pairs(rng, num, held_out), level)
    made: dict[str, Turn] = {}
    for _ in range(20 * turns):
        a, b = rng.sample(items, 2)
        if held_out and not (a.held_out or b.held_out):
            continue
        wanted = rng.random() < 0.5
        gap = 12 if level <= 1 else image.width // 12
        clear = [r for k, r in enumerate(RELATIONS) if abs(a.centre[k // 2] - b.centre[k // 2]) >= gap]
        fitting = [relation for relation in clear if holds(relation, a, b) == wanted]
        if not fitting:
            continue
        question = f"Is the {a.name} {rng.choice(fitting)} the {b.name}?"
        regions = [a.region("first"), b.region("second")]
        made.setdefault(
            question, Turn(question=question, answer_text=yes_no(wanted), answer_type="exact", regions=regions)
        )
        if len(made) == turns:
            break
    if not made:
        return spatial(rng, level, held_out, turns)
    return Draft(turns=list(made.values()), images=[image])


def compare(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """More or fewer, same or not, larger or smaller; yes and no are equally likely."""
    num = rng.randint(*{1: (5, 10), 2: (6, 10), 3: (10, 16), 4: (16, 28)}[level])
    chosen = [rng.choice(pairs(True)) for _ in range(2)] if held_out else []
    palette = rng.sample(all_pairs(held_out), 6)
    chosen += [rng.choice(palette) for _ in range(num - len(chosen))]
    image, items = place(rng, chosen, level)
    tally = {name: sum(name in (item.shape, item.colour) for item in items) for name in (*SHAPES, *COLOURS)}
    possible: dict[bool, list[Turn]] = {True: [], False: []}

    def add(question: str, truth: bool) -> None:
        possible[truth].append(Turn(question=question, answer_text=yes_no(truth), answer_type="exact"))

    shown = [colour for colour in COLOURS if tally[colour]]
    for a in shown:
        for b in shown:
            if a != b:
                add(f"Are there more {a} shapes than {b} shapes?", tally[a] > tally[b])
                add(f"Are there as many {a} shapes as {b} shapes?", tally[a] == tally[b])
    names = [item.name for item in items]
    single = [item for item in items if names.count(item.name) == 1]
    for one in single:
        for other in single:
            if one is not other:
                add(f"Do the {one.name} and the {other.name} have the same colour?", one.colour == other.colour)
                sizes = one.box[2] - one.box[0], other.box[2] - other.box[0]
                if level >= 2 and abs(sizes[0] - sizes[1]) >= 3:
                    add(f"Is the {one.name} larger than the {other.name}?", sizes[0] > sizes[1])
    made: list[Turn] = []
    for _ in range(turns):
        group = possible[rng.random() < 0.5] or possible[True] or possible[False]
        if group:
            made.append(group.pop(rng.randrange(len(group))))
    return Draft(turns=made, images=[image]) if made else compare(rng, level, held_out, turns)


def choice(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Multiple choice: which of these is in the image, which is leftmost, which colour is the circle."""
    num = {1: rng.randint(3, 5), 2: rng.randint(4, 6), 3: 7, 4: 7}[level]
    image, items = place(rng, distinct_pairs(rng, num, held_out), level)
    present = {item.name for item in items}
    absent = [f"{colour} {shape}" for shape, colour in all_pairs(held_out) if f"{colour} {shape}" not in present]
    possible = []
    for item in items:
        if item.held_out != held_out:
            continue
        kind = rng.randrange(3)  # one question an item
        if kind == 0:
            others = rng.sample([colour for colour in COLOURS if colour != item.colour], 3)
            possible.append(letter_question(rng, f"What colour is the {item.shape}?", item.colour, others))
        elif kind == 1:
            others = rng.sample([shape for shape in SHAPES if shape != item.shape], 3)
            possible.append(letter_question(rng, f"What shape is {item.colour}?", item.shape, others))
        else:
            possible.append(letter_question(rng, "Which of these is in the image?", item.name, rng.sample(absent, 3)))
    if level >= 2:
        extremes = (("furthest left", 0, 1), ("furthest right", 0, -1), ("highest", 1, 1), ("lowest", 1, -1))
        for words, axis, sign in extremes:
            order = sorted(items, key=lambda item: sign * item.centre[axis])
            clear = abs(order[0].centre[axis] - order[1].centre[axis]) >= 6
            if clear and (order[0].held_out or not held_out):
                wrong = [item.name for item in rng.sample(order[1:], min(3, len(order) - 1))]
                possible.append(letter_question(rng, f"Which of these is {words}?", order[0].name, wrong))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


SUBSETS = {
    "attributes": Subset(attributes, (0, 1, 2, 3)),
    "spatial": Subset(spatial, (0, 1, 2, 3)),
    "compare": Subset(compare, (1, 2, 3, 4)),
    "choice": Subset(choice, (1, 2, 3, 4)),
    "images": Subset(images, (3, 4)),
    "chart": Subset(chart, (2, 3, 4)),
    "maze": Subset(maze, (2, 3, 4)),
}
