"""An image over a decoder's array is a PIL image like any other, and never shows stale pixels."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw

from step3vl.data.array_image import ArrayImage, pixels_of

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)


@pytest.fixture
def image() -> ArrayImage:
    return ArrayImage(PIXELS.copy())


@pytest.fixture
def plain() -> Image.Image:
    return Image.fromarray(PIXELS)


METHODS = {
    "convert": lambda x: x.convert("L"),
    "copy": lambda x: x.copy(),
    "crop": lambda x: x.crop((2, 1, 20, 30)),
    "deepcopy": copy.deepcopy,
    "paste": lambda x: Image.new("RGB", (20, 20), (1, 2, 3)).paste(x, (3, 4)),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "resize": lambda x: x.resize((5, 6), Image.Resampling.BILINEAR),
    "rotate": lambda x: x.rotate(30),
    "split": lambda x: Image.merge("RGB", x.split()[::-1]),
    "thumbnail": lambda x: x.thumbnail((4, 4)) or x,
    "transform": lambda x: x.transform((7, 7), Image.Transform.EXTENT, (1, 1, 6, 6)),
    "transpose": lambda x: x.transpose(Image.Transpose.ROTATE_90),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_methods_are_pils(method, image, plain):
    found, expected = method(image), method(plain)
    if expected is not None:
        assert (found.size, found.mode, found.tobytes()) == (expected.size, expected.mode, expected.tobytes())


def test_it_is_an_rgb_image(image, plain):
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, image.width, image.height) == ("RGB", (14, 9), 14, 9)
    assert image.format is None and image.info == {}
    assert image.getpixel((3, 4)) == plain.getpixel((3, 4))
    assert image.getbbox() == plain.getbbox() and image.getextrema() == plain.getextrema()


def test_numpy_reads_the_array_itself(image):
    seen = np.asarray(image)
    assert np.shares_memory(seen, image.pixels) and not seen.flags.writeable
    assert pixels_of(image) is image.pixels
    image.load()
    assert np.array_equal(seen, PIXELS), "an array handed out outlives PIL's copy"


def test_changes_are_seen_and_reach_no_array_handed_out(image):
    before = pixels_of(image)
    ImageDraw.Draw(image).rectangle((0, 0, 3, 3), fill=(7, 8, 9))
    image.putpixel((13, 8), (1, 1, 1))
    assert image.pixels is None
    for after in (np.asarray(image), pixels_of(image)):
        assert after[2, 2].tolist() == [7, 8, 9] and after[8, 13].tolist() == [1, 1, 1]
        assert np.array_equal(after[5:8], PIXELS[5:8])
    assert np.array_equal(before, PIXELS)


def test_pixels_of_a_plain_image_are_a_copy_of_its_own(plain):
    pixels = pixels_of(plain)
    pixels[:] = 0
    assert np.array_equal(plain, PIXELS)


@pytest.mark.parametrize("bad", [PIXELS.astype(float), PIXELS[..., 0], PIXELS[..., :2], PIXELS[:, ::2]])
def test_refusals(bad):
    with pytest.raises(ValueError, match="ArrayImage takes contiguous uint8"):
        ArrayImage(bad)
