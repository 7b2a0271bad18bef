"""What a generator returns, and what is held out from training by construction.

A generator is `def digits(rng, level, held_out, turns) -> Draft`; `step3vl.data.corpus.make` turns drafts into samples.
The rules below decide what training never shows; the splits other than train are drawn from the other side of them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from step3vl.types import Region

T = TypeVar("T")
Box = tuple[float, float, float, float]


@dataclass(slots=True, kw_only=True)
class Turn:
    """One question and its answer. `answer` is the checkable form of `answer_text` (the same text when None)."""

    question: str
    answer_text: str
    answer_type: str
    answer: str | None = None
    regions: list[Region] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Draft:
    """A scene and its questions; every question can be answered from the images alone, or from its own text."""

    turns: list[Turn]
    images: list[Image.Image] = field(default_factory=list)
    source: str = "generated"
    licence: str = "Apache-2.0"


@dataclass(frozen=True, slots=True)
class Subset:
    """A generator and the levels it has."""

    generate: Callable[[random.Random, int, bool, int], Draft]
    levels: tuple[int, ...]


# ------------------------------------------------------------------------------------------------ held out


def held_out_number(number: int) -> bool:
    """Numbers of two digits and more that are 3 modulo 7 are never read or worked out in training.

    Single digits are left alone: the writers of the digits are held out instead.
    """
    return number >= 10 and number % 7 == 3


def held_out_operands(a: int, b: int) -> bool:
    """Pairs of operands that no training question combines: one seventh of all."""
    return (a + 3 * b) % 7 == 3


def held_out_layout(layout: object) -> bool:
    """One layout in five, by a hash of its description."""
    return zlib.crc32(repr(layout).encode()) % 5 == 0


def held_out_pair(shape: int, colour: int) -> bool:
    """One shape a colour, by their places in `SHAPES` and `COLOURS`: 7 of 49 pairs."""
    return (shape + 3 * colour) % 7 == 0


def draw_number(rng: random.Random, num_digits: int, held_out: bool) -> int:
    """A number of exactly `num_digits` digits on the wanted side of `held_out_number`."""
    low, high = (0 if num_digits == 1 else 10 ** (num_digits - 1)), 10**num_digits - 1
    while True:
        number = rng.randint(low, high)
        if num_digits == 1 or held_out_number(number) == held_out:
            return number


def draw_operands(rng: random.Random, low: int, high: int, held_out: bool) -> tuple[int, int]:
    """Two numbers in low..high on the wanted side of `held_out_operands`."""
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if held_out_operands(a, b) == held_out:
            return a, b


# ------------------------------------------------------------------------------------------------ answers


def mille(x: float, y: float, image: Image.Image) -> tuple[int, int]:
    """Pixel coordinates as whole thousandths of the image's width and height."""
    return min(1000, round(1000 * x / image.width)), min(1000, round(1000 * y / image.height))


def point_text(box: Box, image: Image.Image) -> str:
    """The centre of a box as the answer to "Point to ...": "(375, 625)"."""
    return "({}, {})".format(*mille((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, image))


def box_text(box: Box, image: Image.Image) -> str:
    """A box as the answer to "Box ...": "[125, 250, 500, 625]"."""
    return "[{}, {}, {}, {}]".format(*mille(box[0], box[1], image), *mille(box[2], box[3], image))


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def letter_question(rng: random.Random, question: str, right: str, wrong: Sequence[str]) -> Turn:
    """A multiple-choice turn. The options are shuffled; the answer is the letter of the right one."""
    options = [right, *dict.fromkeys(text for text in wrong if text != right)]
    rng.shuffle(options)
    lines = [f"{'ABCDEF'[k]}. {text}" for k, text in enumerate(options)]
    letter = "ABCDEF"[options.index(right)]
    return Turn(question="\n".join([question, *lines]), answer_text=letter, answer_type="letter")


def sample_turns(rng: random.Random, turns: Sequence[T], num: int) -> list[T]:
    """Up to `num` of the possible turns, in random order."""
    return rng.sample(list(turns), min(num, len(turns)))
