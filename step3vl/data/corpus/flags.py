"""Flags of countries that do not exist: knowledge that no image and no language gives away, and that must be learnt.

A country's flag has three stripes and one name. Forty are common (level 0), two hundred rare (level 1): a level draws
evenly from its own, so that a training mixture that gives both levels equal weight shows a common flag five times as
often as a rare one. What is asked about the rare ones is tail knowledge, which the report measures in Table 5.

Nothing is held out but the shades: a fact that was never shown cannot be known. A flag is a row of the 64-pixel grid.
"""

from __future__ import annotations

import random
from functools import cache

from step3vl.data.corpus.draft import Draft, Subset, Turn, sample_turns
from step3vl.data.corpus.draw import CELL, COLOURS, GRID, RGB, canvas, cell_box
from step3vl.types import Region

NUM_COMMON, NUM_RARE = 40, 200
STRIPES = ((0, 4), (4, 12), (12, 16))  # pixels of a row, downwards
SHADES = 12
"""By how much a channel of a stripe's colour is off, at most."""

Country = tuple[tuple[str, str, str], str]


@cache
def countries() -> tuple[Country, ...]:
    """(stripes, name) of every country, the common ones first; the same in every corpus."""
    rng = random.Random("flags")
    flags = [(a, b, c) for a in COLOURS for b in COLOURS for c in COLOURS if a != b != c]
    names = [f"{a}{b}{c}{d}" for a in "BDGKLMNPRSTVZ" for b in "aeiou" for c in "bdgklmnprstvz" for d in "aeiou"]
    num = NUM_COMMON + NUM_RARE
    return tuple(zip(rng.sample(flags, num), rng.sample(names, num), strict=True))


def known(level: int) -> tuple[Country, ...]:
    """The countries of a level: 0 common, 1 rare."""
    return countries()[:NUM_COMMON] if level == 0 else countries()[NUM_COMMON:]


def flags(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Four flags. "Whose flag is row 2?" -> "Zumo"."""
    image = canvas()
    possible = []
    for row, (stripes, name) in enumerate(rng.sample(known(level), GRID)):
        for colour, (top, bottom) in zip(stripes, STRIPES):
            shade = tuple(min(255, max(0, part + rng.randint(-SHADES, SHADES))) for part in RGB[colour])
            image.paste(shade, (0, row * CELL + top, image.width, row * CELL + bottom))  # type: ignore[arg-type]
        region = Region(label="answer", box=cell_box(row, 0, GRID))
        question = f"Whose flag is row {row + 1}?"
        possible.append(Turn(question=question, answer_text=name, answer_type="exact", regions=[region]))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


SUBSETS = {"flags": Subset(flags, (0, 1))}
