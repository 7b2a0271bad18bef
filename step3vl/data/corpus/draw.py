"""Pillow drawing shared by the generators: shapes and glyphs as masks, text, cells of the level-0 grid, noise.

At level 0 and 1 a canvas is 64x64 pixels, cut into a 4x4 grid of 16-pixel cells; cell (r, c) covers pixels
16r..16r+15 downwards and 16c..16c+15 to the right.
"""

from __future__ import annotations

import io
import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from step3vl.data.corpus.assets import font
from step3vl.data.corpus.draft import Box

CELL = 16
GRID = 4
CANVAS = CELL * GRID

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring")
COLOURS = ("red", "green", "blue", "yellow", "white", "magenta", "cyan")
RGB = {
    "red": (255, 40, 40),
    "green": (40, 220, 60),
    "blue": (60, 90, 255),
    "yellow": (255, 230, 40),
    "white": (255, 255, 255),
    "magenta": (255, 60, 220),
    "cyan": (40, 230, 240),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
}
Colour = tuple[int, int, int]


def canvas(width: int = CANVAS, height: int | None = None, colour: Colour = (0, 0, 0)) -> Image.Image:
    return Image.new("RGB", (width, height or width), colour)


def cell_box(row: int, column: int, num_columns: int = 1) -> tuple[int, int, int, int]:
    """Pixels of `num_columns` cells that start at (row, column); x1 and y1 exclusive."""
    return column * CELL, row * CELL, (column + num_columns) * CELL, (row + 1) * CELL


def jitter(rng: random.Random, level: int) -> tuple[int, int]:
    """Level 0 is aligned; level 1 moves each object by at most two pixels each way."""
    return (0, 0) if level == 0 else (rng.randint(-2, 2), rng.randint(-2, 2))


def clip(x: int, y: int, size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """The nearest place at which something of `size` lies wholly in the image."""
    return max(0, min(x, image.width - size[0])), max(0, min(y, image.height - size[1]))


# ------------------------------------------------------------------------------------------------ shapes


@cache
def shape_mask(shape: str, size: int) -> Image.Image:
    """A filled shape that fills `size` x `size` pixels, antialiased ("L")."""
    k = 4
    n = size * k
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, n - 1, n - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n - 1), (0, n - 1)], fill=255)
    elif shape == "diamond":
        draw.polygon([(n / 2, 0), (n - 1, n / 2), (n / 2, n - 1), (0, n / 2)], fill=255)
    elif shape == "cross":
        third = n // 3
        draw.rectangle((third, 0, n - third - 1, n - 1), fill=255)
        draw.rectangle((0, third, n - 1, n - third - 1), fill=255)
    elif shape == "star":
        points = []
        for i in range(10):
            radius, angle = (n / 2 if i % 2 == 0 else n / 5), math.pi * (i / 5 - 0.5)
            points.append((n / 2 + radius * math.cos(angle), n / 2 + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        draw.ellipse((n // 4, n // 4, n - n // 4 - 1, n - n // 4 - 1), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}; shapes are {', '.join(SHAPES)}")
    return mask.resize((size, size), Image.Resampling.BOX)


def draw_shape(image: Image.Image, shape: str, colour: Colour, box: tuple[int, int, int, int]) -> None:
    """Draw a shape that fills a square box (pixels)."""
    image.paste(colour, box, shape_mask(shape, box[2] - box[0]))


# ------------------------------------------------------------------------------------------------ text


@cache
def glyph_mask(character: str, font_name: str, height: int = 13, width: int = 14) -> Image.Image:
    """One capital letter or digit, its ink scaled to `height` pixels (and at most `width` wide), "L"."""
    face = font(font_name, 4 * height)
    left, top, right, bottom = (int(x) for x in face.getbbox(character))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), character, font=face, fill=255)
    ink = mask.getbbox() or (0, 0, 1, 1)
    mask = mask.crop(ink)
    scaled = max(2, min(width, round(mask.width * height / mask.height)))
    return mask.resize((scaled, height), Image.Resampling.BOX)


def draw_glyph(image: Image.Image, character: str, font_name: str, box: Box, height: int = 13) -> None:
    """One white glyph in the middle of a cell; + and - are drawn as strokes, as fonts make them thin at this size."""
    x, y = int(box[0] + box[2]) // 2, int(box[1] + box[3]) // 2
    colour = (255, 255, 255)
    if character in "+-":
        draw = ImageDraw.Draw(image)
        draw.rectangle((x - 5, y - 1, x + 4, y), fill=colour)
        if character == "+":
            draw.rectangle((x - 1, y - 5, x, y + 4), fill=colour)
        return
    mask = glyph_mask(character, font_name, height, height + 1)
    place = clip(x - mask.width // 2, y - mask.height // 2, mask.size, image)
    image.paste(colour, (*place, place[0] + mask.width, place[1] + mask.height), mask)


def text_size(text: str, font_name: str, size: int) -> tuple[int, int]:
    """Width and line height in pixels of one line of text."""
    face = font(font_name, size)
    ascent, descent = face.getmetrics()
    return math.ceil(face.getlength(text)), ascent + descent


def draw_text(
    image: Image.Image, at: tuple[float, float], text: str, font_name: str, size: int, colour: Colour = (0, 0, 0)
) -> tuple[int, int, int, int]:
    """One line of text whose line box starts at `at`. Returns the line box in pixels."""
    ImageDraw.Draw(image).text(at, text, font=font(font_name, size), fill=colour)
    width, height = text_size(text, font_name, size)
    return int(at[0]), int(at[1]), int(at[0]) + width, int(at[1]) + height


# ------------------------------------------------------------------------------------------------ backgrounds, damage


def paper(rng: random.Random) -> tuple[Colour, Colour]:
    """A background and an ink that contrast: light paper with dark ink, or the reverse."""
    light = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(205, 255))
    dark = (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 80))
    return (light, dark) if rng.random() < 0.7 else (dark, light)


def dim(rng: random.Random) -> Colour:
    """A dark background on which every colour of `COLOURS` is seen."""
    return rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 60)


def weather(image: Image.Image, rng: random.Random, angle: float = 0.0) -> Image.Image:
    """What a camera does: rotation by at most `angle` degrees, blur, noise, and JPEG blocks. The size stays.

    The result is a JPEG image, and is stored as one: noise makes PNG files large.
    """
    if angle:
        corner = image.getpixel((0, 0))
        image = image.rotate(rng.uniform(-angle, angle), Image.Resampling.BICUBIC, fillcolor=corner)  # type: ignore[arg-type]
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 10), (image.height, image.width, 1))
    image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(40, 85))
    return Image.open(buffer)
