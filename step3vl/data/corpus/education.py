"""School work on paper: sums, equations, plane figures, plots of functions, derivatives. Answers come from exact maths.

Levels: single-digit sums in cells (0, 1), two-digit sums and linear equations (2), figures and plots (2 to 4), calculus
(3, 4). Held out: pairs of operands, fonts, digit writers.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from PIL import Image, ImageDraw

from step3vl.data.corpus.assets import DIGITS_LICENCE, DIGITS_SOURCE, digit_images, digits_of, font_names
from step3vl.data.corpus.draft import Draft, Subset, Turn, draw_operands, held_out_operands, sample_turns
from step3vl.data.corpus.draw import (
    CELL,
    GRID,
    Colour,
    canvas,
    cell_box,
    clip,
    draw_glyph,
    draw_text,
    jitter,
    paper,
    text_size,
    weather,
)
from step3vl.data.corpus.formulas import HELD_OUT_MATHS, TRAIN_MATHS, formula_mask
from step3vl.types import Region


def _solve(row: int, answer: int, box: tuple[int, int, int, int]) -> Turn:
    region = Region(label="answer", box=box)
    return Turn(question=f"Solve row {row}.", answer_text=str(answer), answer_type="number", regions=[region])


def sums(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Four rows such as 3+4, handwritten at levels 0 and 1 and printed at level 2. "Solve row 1." -> "7"."""
    image = canvas(64 if level <= 1 else 128)
    name = rng.choice(font_names(held_out, letters_only=True))
    possible = []
    for row in range(GRID):
        sign = rng.choice("+-" if level <= 1 else "+-x")
        a, b = draw_operands(rng, 0, 9 if level <= 1 or sign == "x" else 99, held_out)
        while sign == "-" and a < b:
            a, b = draw_operands(rng, 0, 9 if level <= 1 else 99, held_out)
        answer = {"+": a + b, "-": a - b, "x": a * b}[sign]
        if level <= 1:
            for column, character in enumerate(f"{a}{sign}{b}"):
                x0, y0, x1, y1 = cell_box(row, column)
                dx, dy = jitter(rng, level)
                if character in "+-":
                    draw_glyph(image, character, name, (x0 + dx, y0 + dy, x1 + dx, y1 + dy))
                else:
                    mask = digit_images()[0][rng.choice(digits_of(int(character), held_out))]
                    at = clip(x0 + dx, y0 + dy, mask.size, image)
                    image.paste((255, 255, 255), (*at, at[0] + CELL, at[1] + CELL), mask)
            box = cell_box(row, 0, 3)
        else:
            text = f"{a} {sign} {b}"
            at = (4 + rng.randint(0, 24), 32 * row + rng.randint(2, 6))
            box = draw_text(image, at, text, name, rng.randint(16, 20), (255, 255, 255))
        possible.append(_solve(row + 1, answer, box))
    chosen = sample_turns(rng, possible, turns)
    if level <= 1:
        return Draft(turns=chosen, images=[image], source=DIGITS_SOURCE, licence=DIGITS_LICENCE)
    return Draft(turns=chosen, images=[image])


# ------------------------------------------------------------------------------------------------ equations, calculus


@cache
def _sympy() -> Any:
    import sympy

    return sympy


def _page(rng: random.Random, latex: str, level: int, held_out: bool) -> Image.Image:
    """A formula on paper; photographed at level 4."""
    family = rng.choice(HELD_OUT_MATHS if held_out else TRAIN_MATHS)
    mask = formula_mask(latex, family, {2: 100, 3: 130, 4: 180}[level])
    background, ink = paper(rng)
    image = canvas(mask.width + 32, mask.height + 32, background)
    image.paste(ink, (16, 16, 16 + mask.width, 16 + mask.height), mask)
    return weather(image, rng, angle=2.0) if level == 4 else image


def _term(factor: int) -> str:
    return {1: "x", -1: "-x"}.get(factor, f"{factor}x")


def equation(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Solve for x: ax + b = c, then ax + b = cx + d, then a quadratic with whole roots. The answer shows the steps."""
    a, b = draw_operands(rng, 2, 9, held_out)
    x = rng.choice([n for n in range(-9, 10) if n])
    if level == 2:
        latex, steps = f"{a}x + {b} = {a * x + b}", [f"{_term(a)} = {a * x}"]
        question, answer = "Solve for x.", x
    elif level == 3:
        c = rng.choice([n for n in range(2, 10) if n != a])
        d = (a - c) * x + b
        latex = f"{a}x + {b} = {c}x {'+' if d >= 0 else '-'} {abs(d)}"
        steps = [f"{_term(a - c)} = {d - b}"]
        question, answer = "Solve for x.", x
    else:
        low, high = sorted((x, rng.choice([n for n in range(-9, 10) if n not in (0, x, -x)])))
        p, q = -(low + high) * a, low * high * a
        latex = f"{a}x^2 {'+' if p >= 0 else '-'} {abs(p)}x {'+' if q >= 0 else '-'} {abs(q)} = 0"
        steps = [f"x^2 {'+' if p >= 0 else '-'} {_term(abs(p) // a)} {'+' if q >= 0 else '-'} {abs(q) // a} = 0"]
        steps += [f"x = {low} or x = {high}"]
        larger = rng.random() < 0.5
        question = f"Solve for x and give the {'larger' if larger else 'smaller'} root."
        answer = high if larger else low
    text = "\n".join([*steps, f"x = {answer}"])
    turn = Turn(question=question, answer_text=text, answer=str(answer), answer_type="number")
    return Draft(turns=[turn], images=[_page(rng, latex, level, held_out)])


def calculus(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """The derivative of a polynomial (level 3) or of products with sin, cos and exp (level 4)."""
    sympy = _sympy()
    x = sympy.Symbol("x")
    a, b = draw_operands(rng, 2, 9, held_out)
    function = a * x ** rng.randint(2, 4) + b * x + rng.randint(-9, 9)
    if level == 4:
        function = rng.choice([a * x**2 * sympy.sin(b * x), a * x * sympy.exp(b * x), a * x**3 + sympy.cos(b * x)])
    answer = str(sympy.expand(sympy.diff(function, x))).replace("**", "^")
    image = _page(rng, f"f(x) = {sympy.latex(function)}", level, held_out)
    turn = Turn(question="What is f'(x)?", answer_text=answer, answer_type="math")
    return Draft(turns=[turn], images=[image])


# ------------------------------------------------------------------------------------------------ figures

TRIPLES = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29), (9, 40, 41))


def _label(image: Image.Image, centre: tuple[float, float], text: str, name: str, size: int, ink: Colour) -> None:
    width, height = text_size(text, name, size)
    draw_text(image, (centre[0] - width / 2, centre[1] - height / 2), text, name, size, ink)


def geometry(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Labelled figures: rectangles (2), right triangles and angles (3), figures cut from rectangles (4)."""
    side, size = {2: (128, 14), 3: (256, 18), 4: (480, 22)}[level]
    background, ink = paper(rng)
    image = canvas(side, colour=background)
    name = rng.choice(font_names(held_out))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = side // 5, side // 4, side - side // 5, side - side // 4
    kind = {2: "rectangle", 3: rng.choice(("right", "angles")), 4: rng.choice(("cut", "right"))}[level]

    def number(question: str, steps: str, answer: int) -> Turn:
        return Turn(question=question, answer_text=steps, answer=str(answer), answer_type="number")

    if kind == "rectangle":
        a, b = draw_operands(rng, 2, 12, held_out)
        width, height = (right - left) * a // max(a, b), (bottom - top) * b // max(a, b)
        left, top = (side - width) // 2, (side - height) // 2
        draw.rectangle((left, top, left + width, top + height), outline=ink, width=2)
        _label(image, (side / 2, top - size * 0.8), str(a), name, size, ink)
        _label(image, (left - size * 0.8, side / 2), str(b), name, size, ink)
        possible = [
            number("What is the area of the rectangle?", f"{a} * {b} = {a * b}", a * b),
            number("What is the perimeter of the rectangle?", f"2 * ({a} + {b}) = {2 * (a + b)}", 2 * (a + b)),
        ]
    elif kind == "right":
        while True:
            k = rng.randint(1, 9)
            a, b, c = (n * k for n in rng.choice(TRIPLES))
            if held_out_operands(a, b) == held_out:
                break
        draw.polygon([(left, top), (left, bottom), (right, bottom)], outline=ink, width=2)
        draw.rectangle((left, bottom - size // 2, left + size // 2, bottom), outline=ink)
        hidden = rng.choice("abc")
        middle = side / 2
        places = {"a": (left - size * 1.2, middle), "b": (middle, bottom + size), "c": (middle + size, middle - size)}
        for letter, value in zip("abc", (a, b, c)):
            _label(image, places[letter], "x" if letter == hidden else str(value), name, size, ink)
        if hidden == "c":
            steps, x = f"x^2 = {a}^2 + {b}^2 = {c * c}\nx = {c}", c
        else:
            x, other = (a, b) if hidden == "a" else (b, a)
            steps = f"x^2 = {c}^2 - {other}^2 = {x * x}\nx = {x}"
        possible = [number("The triangle has a right angle. What is x?", steps, x)]
    elif kind == "angles":
        while True:
            a, b = draw_operands(rng, 25, 110, held_out)
            if a + b <= 155:
                break
        draw.polygon([(side / 2, top), (left, bottom), (right, bottom)], outline=ink, width=2)
        _label(image, (left + size * 1.6, bottom - size), str(a), name, size - 4, ink)
        _label(image, (right - size * 1.6, bottom - size), str(b), name, size - 4, ink)
        _label(image, (side / 2, top + size * 1.6), "x", name, size - 4, ink)
        possible = [number("Angles are in degrees. What is x?", f"x = 180 - {a} - {b} = {180 - a - b}", 180 - a - b)]
    else:
        a, b = draw_operands(rng, 6, 20, held_out)
        c, d = rng.randint(2, a - 3), rng.randint(2, b - 3)
        cut_x, cut_y = right - (right - left) * c // a, top + (bottom - top) * d // b
        corners = [(left, top), (cut_x, top), (cut_x, cut_y), (right, cut_y), (right, bottom), (left, bottom)]
        draw.polygon(corners, outline=ink, width=2)
        _label(image, (side / 2, bottom + size), str(a), name, size, ink)
        _label(image, (left - size, side / 2), str(b), name, size, ink)
        _label(image, ((cut_x + right) / 2, cut_y - size * 0.8), str(c), name, size, ink)
        _label(image, (cut_x + size, (top + cut_y) / 2), str(d), name, size, ink)
        area, around = a * b - c * d, 2 * (a + b)
        steps = f"{a} * {b} = {a * b}\n{c} * {d} = {c * d}\n{a * b} - {c * d} = {area}"
        possible = [
            number("All angles are right angles. What is the area?", steps, area),
            number("All angles are right angles. What is the perimeter?", f"2 * ({a} + {b}) = {around}", around),
        ]
    if level == 4:
        image = weather(image, rng)
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


def plot(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A line y = ax + b (levels 2, 3) or a parabola (4) on squared paper: intercept, slope, value, vertex."""
    num, cell = {2: (5, 12), 3: (6, 18), 4: (8, 28)}[level]  # squares each way from the origin
    side = 2 * num * cell + 16
    image = canvas(side, colour=(255, 255, 255))
    draw = ImageDraw.Draw(image)
    origin = num * cell + 8
    for k in range(-num, num + 1):
        ink = (0, 0, 0) if k == 0 else (205, 215, 225)
        draw.line((origin + k * cell, 8, origin + k * cell, side - 8), fill=ink)
        draw.line((8, origin + k * cell, side - 8, origin + k * cell), fill=ink)
    name = rng.choice(font_names(held_out))
    draw_text(image, (origin + cell + 1 - 4, origin + 1), "1", name, 11)
    while True:
        a, b = rng.choice((-2, -1, 1, 2)), rng.randint(1 - num, num - 1)
        if held_out_operands(a, b) == held_out:
            break
    shift = rng.randint(-3, 3) if level == 4 else 0

    def value(x: float) -> float:
        return a * (x - shift) ** 2 + b if level == 4 else a * x + b

    points = [(k / 20, value(k / 20)) for k in range(-20 * num, 20 * num + 1)]
    line = [(origin + x * cell, origin - y * cell) for x, y in points if abs(y) <= num]
    draw.line(line, fill=rng.choice([(200, 30, 30), (20, 60, 200), (10, 120, 60)]), width=2)

    def number(question: str, answer: float) -> Turn:
        return Turn(question=question, answer_text=str(int(answer)), answer_type="number")

    inside = [x for x in range(-num, num + 1) if abs(value(x)) <= num and (x != 0 or level == 4)]
    at = rng.choice(inside)
    possible = [number(f"What is y when x = {at}?", value(at))]
    if level == 4:
        possible += [number("What is the x coordinate of the vertex?", shift), number("What is y at the vertex?", b)]
        image = weather(image, rng)
    else:
        possible += [number("Where does the line cross the y axis?", b), number("What is the slope of the line?", a)]
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


SUBSETS = {
    "sums": Subset(sums, (0, 1, 2)),
    "equation": Subset(equation, (2, 3, 4)),
    "geometry": Subset(geometry, (2, 3, 4)),
    "plot": Subset(plot, (2, 3, 4)),
    "calculus": Subset(calculus, (3, 4)),
}
