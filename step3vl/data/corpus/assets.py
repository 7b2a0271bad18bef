"""Real bytes that come with ordinary dependencies, and which part of each is held out.

Photographs from scikit-image and scikit-learn, handwritten digits from scikit-learn (UCI optdigits), and the fonts that
matplotlib carries. Everything loads without a network. Licences are those stated by the packages.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

DIGITS_SOURCE = "sklearn digits (UCI optdigits)"
DIGITS_LICENCE = "CC-BY-4.0"
NUM_HELD_OUT_DIGITS = 397
"""The file lies in blocks of one writer each, so its end holds writers that training never sees."""


# ------------------------------------------------------------------------------------------------ handwritten digits


@cache
def digit_images() -> tuple[list[Image.Image], list[int]]:
    """1797 real handwritten digits, 8x8 enlarged to 16x16 ("L", bright on black), and their values."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = np.minimum(data.images * 16, 255).astype(np.uint8)  # [1797,8,8]
    images = [Image.fromarray(digit).resize((16, 16), Image.Resampling.BILINEAR) for digit in small]
    return images, [int(value) for value in data.target]


@cache
def digits_of(value: int, held_out: bool) -> list[int]:
    """Row numbers, in `digit_images`, of one digit on one side of the split."""
    values = digit_images()[1]
    first = len(values) - NUM_HELD_OUT_DIGITS
    rows = range(first, len(values)) if held_out else range(first)
    return [row for row in rows if values[row] == value]


# ------------------------------------------------------------------------------------------------ fonts

TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
)
HELD_OUT_FONTS = ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneralItalic")
TRAIN_LETTER_FONTS = (*TRAIN_FONTS, "cmb10", "cmr10", "cmti10", "cmtt10")
"""Computer Modern has letters and digits in their usual places, but not all punctuation."""
HELD_OUT_LETTER_FONTS = (*HELD_OUT_FONTS, "cmss10")


def font_names(held_out: bool, letters_only: bool = False) -> tuple[str, ...]:
    """Fonts of one side of the split; `letters_only` adds those that lack punctuation."""
    if letters_only:
        return HELD_OUT_LETTER_FONTS if held_out else TRAIN_LETTER_FONTS
    return HELD_OUT_FONTS if held_out else TRAIN_FONTS


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib's by file name without extension, `size` in pixels an em."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


# ------------------------------------------------------------------------------------------------ photographs


class Photo(NamedTuple):
    """A photograph: what it shows, its file, the box (pixels) that shows it, the axis along which it is split."""

    name: str
    package: str
    file: str
    box: tuple[int, int, int, int]
    axis: str
    licence: str


PHOTOS = (
    Photo("astronaut", "skimage", "astronaut.png", (60, 0, 450, 512), "y", "public domain (NASA)"),
    Photo("brick", "skimage", "brick.png", (0, 0, 512, 512), "x", "CC0-1.0"),
    Photo("photographer", "skimage", "camera.png", (60, 30, 440, 500), "y", "CC0-1.0"),
    Photo("cat", "skimage", "chelsea.png", (80, 0, 451, 300), "x", "CC0-1.0"),
    Photo("coffee", "skimage", "coffee.png", (60, 0, 560, 390), "x", "CC0-1.0"),
    Photo("coins", "skimage", "coins.png", (0, 0, 384, 303), "x", "no known copyright restrictions (Brooklyn Museum)"),
    Photo("grass", "skimage", "grass.png", (0, 0, 512, 512), "x", "CC0-1.0"),
    Photo("gravel", "skimage", "gravel.png", (0, 0, 512, 512), "x", "CC0-1.0"),
    Photo("horse", "skimage", "horse.png", (10, 0, 400, 320), "x", "CC0-1.0"),
    Photo("galaxies", "skimage", "hubble_deep_field.jpg", (0, 0, 1000, 872), "x", "public domain (NASA)"),
    Photo("tissue", "skimage", "ihc.png", (0, 0, 512, 512), "x", "no known copyright restrictions (CMMI)"),
    Photo("motorcycle", "skimage", "motorcycle_left.png", (60, 60, 700, 480), "x", "CC0-1.0"),
    Photo("retina", "skimage", "retina.jpg", (180, 180, 1230, 1230), "x", "CC0-1.0"),
    Photo("rocket", "skimage", "rocket.jpg", (240, 110, 400, 427), "y", "public domain (SpaceX)"),
    Photo("flower", "sklearn", "flower.jpg", (165, 5, 445, 300), "x", "CC-BY-2.0"),
    Photo("temple", "sklearn", "china.jpg", (60, 0, 410, 427), "x", "CC-BY-2.0"),
)


@cache
def photo(number: int) -> Image.Image:
    """The whole photograph as RGB."""
    entry = PHOTOS[number]
    if entry.package == "skimage":
        import skimage

        path = Path(skimage.__file__).parent / "data" / entry.file
    else:
        import sklearn

        path = Path(sklearn.__file__).parent / "datasets" / "images" / entry.file
    return Image.open(path).convert("RGB")


def photo_region(number: int, held_out: bool) -> tuple[int, int, int, int]:
    """The half of the photograph from which one side of the split takes its crops; the halves do not overlap."""
    x0, y0, x1, y1 = PHOTOS[number].box
    if PHOTOS[number].axis == "x":
        middle = (x0 + x1) // 2
        return (middle, y0, x1, y1) if held_out else (x0, y0, middle, y1)
    middle = (y0 + y1) // 2
    return (x0, middle, x1, y1) if held_out else (x0, y0, x1, middle)


def photo_source(number: int) -> str:
    entry = PHOTOS[number]
    package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[entry.package]
    return f"{package} {entry.file}"
