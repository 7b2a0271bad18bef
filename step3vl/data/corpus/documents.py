"""Documents: real handwritten digits, words in many fonts, lines of print, formulas, tables and receipts.

Levels 0 and 1 of digits and words are four rows of cells; higher levels are free, longer, and at level 4 photographed.
Held out: the digits' writers, numbers that are 3 modulo 7, fonts, and one family of mathematical type.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from step3vl.data.corpus.assets import DIGITS_LICENCE, DIGITS_SOURCE, digit_images, digits_of, font_names
from step3vl.data.corpus.draft import Draft, Subset, Turn, draw_number, sample_turns
from step3vl.data.corpus.draw import (
    CELL,
    GRID,
    canvas,
    cell_box,
    clip,
    dim,
    draw_glyph,
    draw_text,
    jitter,
    paper,
    text_size,
    weather,
)
from step3vl.data.corpus.formulas import HELD_OUT_MATHS, TRAIN_MATHS, formula_mask
from step3vl.data.corpus.words import WORDS, pseudo_word
from step3vl.types import Region


def _read(number: int, text: str, box: tuple[int, int, int, int], what: str = "row") -> Turn:
    region = Region(label="answer", box=box)
    return Turn(question=f"Read {what} {number}.", answer_text=text, answer_type="exact", regions=[region])


# ------------------------------------------------------------------------------------------------ digits and words


def digits(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Rows of real handwritten digits. "Read row 2." -> "471"."""
    num_rows, most, side = {0: (4, 3, 64), 1: (4, 3, 64), 2: (4, 4, 112), 3: (6, 5, 224), 4: (9, 7, 448)}[level]
    image = canvas(side, colour=dim(rng) if level > 1 else (0, 0, 0))
    ink = (255, 255, 255) if level <= 1 else tuple(rng.randint(170, 255) for _ in range(3))
    height = side // num_rows
    possible = []
    for row in range(num_rows):
        text = str(draw_number(rng, rng.randint(1 if level <= 2 else 3, most), held_out))
        size = CELL if level <= 1 else rng.randint(16, min(height - 4, side // (most + 1)))
        x = 0 if level <= 1 else rng.randint(2, side - size * len(text) - 2)
        y = row * height + (0 if level <= 1 else rng.randint(0, height - size))
        box = (x, y, x + size * len(text), y + size)
        for k, character in enumerate(text):
            mask = digit_images()[0][rng.choice(digits_of(int(character), held_out))]
            mask = mask if size == CELL else mask.resize((size, size), Image.Resampling.BICUBIC)
            dx, dy = jitter(rng, min(level, 1))
            at = clip(x + k * size + dx, y + dy, mask.size, image)
            image.paste(ink, (*at, at[0] + size, at[1] + size), mask)  # type: ignore[arg-type]
        possible.append(_read(row + 1, text, box))
    if level == 4:
        image = weather(image, rng)
    chosen = sample_turns(rng, possible, turns)
    return Draft(turns=chosen, images=[image], source=DIGITS_SOURCE, licence=DIGITS_LICENCE)


def words(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Rows of words. Levels 0 and 1: two to four capitals, one a cell; then lines of print, photographed at level 4."""
    if level <= 1:
        return _letter_rows(rng, level, held_out, turns)
    num_lines, most, side = {2: (4, 1, 120), 3: (7, 3, 256), 4: (12, 6, 640)}[level]
    background, ink = paper(rng)
    image = canvas(side, colour=background)
    name = rng.choice(font_names(held_out))
    size = rng.randint(14, 20) if level < 4 else rng.randint(18, 26)
    height = (side - 16) // num_lines
    possible = []
    for row in range(num_lines):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))
        text = rng.choice((str.lower, str.upper, str.capitalize))(text)
        while text_size(text, name, size)[0] > side - 16:
            text = text.rpartition(" ")[0] or text[:-1]
        x = 8 + rng.randint(0, side - 16 - text_size(text, name, size)[0]) * (level == 2)
        box = draw_text(image, (x, 8 + row * height + max(0, height - size - 8) // 2), text, name, size, ink)
        possible.append(_read(row + 1, text, box, "line"))
    if level == 4:
        image = weather(image, rng, angle=1.0)
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


def _letter_rows(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    image = canvas()
    name = rng.choice(font_names(held_out, letters_only=True))
    possible = []
    for row in range(GRID):
        text = pseudo_word(rng, rng.randint(2, 4))
        for column, character in enumerate(text):
            x0, y0, x1, y1 = cell_box(row, column)
            dx, dy = jitter(rng, level)
            draw_glyph(image, character, name, (x0 + dx, y0 + dy, x1 + dx, y1 + dy), 13 if level == 0 else 11)
        possible.append(_read(row + 1, text, cell_box(row, 0, len(text))))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


# ------------------------------------------------------------------------------------------------ formulas


def formula(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A formula set by matplotlib's mathtext -> its LaTeX."""
    text = _latex(rng, level - 1)
    family = rng.choice(HELD_OUT_MATHS if held_out else TRAIN_MATHS)
    dpi = rng.randint(100, 140) if level < 4 else rng.randint(130, 200)
    mask = formula_mask(text, family, dpi)
    background, ink = paper(rng)
    image = canvas(max(mask.width + 24, 64), max(mask.height + 24, 48), background)
    at = (rng.randint(4, image.width - mask.width - 4), rng.randint(4, image.height - mask.height - 4))
    image.paste(ink, (*at, at[0] + mask.width, at[1] + mask.height), mask)
    if level == 4:
        image = weather(image, rng, angle=2.0)
    turn = Turn(question="Write this formula in LaTeX.", answer_text=text, answer_type="exact")
    return Draft(turns=[turn], images=[image])


def _latex(rng: random.Random, depth: int) -> str:
    atom = rng.choice(["a", "b", "x", "y", "n", "k", r"\alpha", r"\beta", r"\pi", str(rng.randint(1, 9))])
    if depth == 0:
        return atom
    inner, other = _latex(rng, depth - 1), _latex(rng, max(0, depth - 2))
    forms = [
        rf"\frac{{{inner}}}{{{other}}}",
        rf"\sqrt{{{inner}}}",
        rf"{atom}^{{{rng.randint(2, 5)}}} + {inner}",
        rf"{inner} - {atom}_{{{rng.randint(0, 5)}}}",
        rf"\sin({inner})",
    ]
    if depth > 1:
        forms += [rf"\sum_{{i=1}}^{{n}} {inner}", rf"\int_{{0}}^{{{atom}}} {inner} dx", rf"{inner} \leq {other}"]
    return rng.choice(forms)


# ------------------------------------------------------------------------------------------------ tables and receipts


def table(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A ruled or open table -> Markdown, or one of its cells."""
    num_rows, num_columns = {2: (2, 2), 3: (4, 3), 4: (7, 5)}[level]
    size = {2: 14, 3: 14, 4: rng.randint(14, 20)}[level]
    name = rng.choice(font_names(held_out))
    header = rng.sample([word for word in WORDS if len(word) <= 6], num_columns)
    header = [word.capitalize() for word in header]
    numbers = range(1, num_columns)
    rows = [[rng.choice(WORDS), *(str(rng.randint(1, 99)) for _ in numbers)] for _ in range(num_rows)]
    widths = [max(text_size(row[c], name, size)[0] for row in [header, *rows]) + 12 for c in range(num_columns)]
    height = size + 10
    background, ink = paper(rng)
    image = canvas(sum(widths) + 16, height * (num_rows + 1) + 16, background)
    draw = ImageDraw.Draw(image)
    ruled = rng.random() < 0.6
    for r, row in enumerate([header, *rows]):
        x, y = 8, 8 + r * height
        for c, text in enumerate(row):
            draw_text(image, (x + 6, y + 3), text, name, size, ink)
            if ruled:
                draw.rectangle((x, y, x + widths[c], y + height), outline=ink)
            x += widths[c]
    if not ruled:
        draw.line((8, 8 + height, image.width - 8, 8 + height), fill=ink, width=2)
    if level == 4:
        image = weather(image, rng, angle=1.0)
    lines = [header, ["---"] * num_columns, *rows]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    whole = Turn(question="Write this table in Markdown.", answer_text=markdown, answer_type="exact")
    cells = []
    for c in numbers:
        r = rng.randrange(num_rows)
        question = f"What is in row {r + 1} below the header of column {header[c]}?"
        cells.append(Turn(question=question, answer_text=rows[r][c], answer_type="exact"))
    return Draft(turns=[*sample_turns(rng, cells, turns - 1), whole], images=[image])


GOODS = ("tea", "milk", "bread", "soap", "rice", "salt", "eggs", "fish", "jam", "beans", "cheese", "apples")


def receipt(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A till receipt: the price of an item, how many were bought, or the total."""
    num_items, size = {2: (3, 12), 3: (6, 14), 4: (12, rng.randint(16, 20))}[level]
    name = rng.choice([n for n in font_names(held_out) if "Mono" in n])
    goods = rng.sample(GOODS, num_items)
    counts = [rng.randint(1, 3 if level == 2 else 9) for _ in goods]
    cents = [rng.randint(50, 999) for _ in goods]
    total = sum(n * c for n, c in zip(counts, cents))
    lines = [f"{good:<7}{n:>2} x{c / 100:>6.2f}" for good, n, c in zip(goods, counts, cents)]
    lines += ["-" * 17, f"{'TOTAL':<9}{total / 100:>8.2f}"]
    width, height = text_size(lines[0], name, size)
    image = canvas(width + 24, height * (len(lines) + 1) + 24, (rng.randint(235, 255),) * 3)
    draw_text(image, (12, 8), rng.choice(["CORNER SHOP", "MARKET HALL", "STATION CAFE"]), name, size)
    for k, line in enumerate(lines):
        draw_text(image, (12, 12 + height * (k + 1)), line, name, size)
    if level == 4:
        image = weather(image, rng, angle=1.5)
    asked = [("What is the total?", f"{total / 100:.2f}")]
    for good, n, c in zip(goods, counts, cents):
        asked += [(f"What does one {good} cost?", f"{c / 100:.2f}"), (f"How many {good} were bought?", str(n))]
    possible = [Turn(question=question, answer_text=answer, answer_type="number") for question, answer in asked]
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


SUBSETS = {
    "digits": Subset(digits, (0, 1, 2, 3, 4)),
    "words": Subset(words, (0, 1, 2, 3, 4)),
    "formula": Subset(formula, (2, 3, 4)),
    "table": Subset(table, (2, 3, 4)),
    "receipt": Subset(receipt, (2, 3, 4)),
}
