"""Shared by the tests of the corpus: draw samples, take their questions apart, see what is in their pixels."""

from __future__ import annotations

import numpy as np

from step3vl.data.corpus.draw import COLOURS, RGB, SHAPES, shape_mask
from step3vl.data.corpus.make import draw_samples
from step3vl.types import IMAGE_MARK, Region, Sample

NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"


def draw(name: str, level: int, num: int, split: str = "train", turns: int = 6) -> list[Sample]:
    domain, subset = name.split("/")
    return list(draw_samples(0, split, domain, subset, level, num, turns))


def questions(sample: Sample) -> list[tuple[str, str]]:
    """(question, answer) of every turn, without image marks."""
    texts = [message.content.replace(IMAGE_MARK, "") for message in sample.messages]
    return list(zip(texts[::2], texts[1::2]))


def centre(region: Region) -> tuple[float, float]:
    return (region.box[0] + region.box[2]) / 2, (region.box[1] + region.box[3]) / 2


def name_at(sample: Sample, region: Region) -> str:
    """Colour from the pixels, shape by the best match of its outline, at level 0."""
    x0, y0, x1, y1 = map(int, region.box)
    pixels = np.asarray(sample.images[0])[y0:y1, x0:x1].astype(float)
    alpha = pixels.max(axis=2) / pixels.max()
    shape = min(SHAPES, key=lambda s: np.abs(alpha - np.asarray(shape_mask(s, x1 - x0)) / 255).sum())
    bright = np.median(pixels.reshape(-1, 3)[alpha.ravel() > 0.9], axis=0)
    return f"{min(COLOURS, key=lambda c: np.abs(bright - RGB[c]).sum())} {shape}"
