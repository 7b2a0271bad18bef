"""The picture of what the model sees: the encoder's own pixels, the grid, and counts that are the processor's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from step3vl.data.crop_sheet import GRID, MARGIN, caption, crop_sheet, shown
from step3vl.data.images import views
from step3vl.data.processor import Processor
from step3vl.types import ImageSpec, Message, MultiCrop, Prompt
from tests.data.test_reference_images import photo

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TINY = ImageSpec(4, *CLIP, MultiCrop(global_size=64, crop_size=48, max_side=288, min_side=8))
FULL = ImageSpec(14, *CLIP, MultiCrop())


def tokens_of(spec: ImageSpec):
    return lambda pixels: (-(-pixels // spec.patch_size // 4)) ** 2


def contains(sheet: np.ndarray, tile: np.ndarray) -> bool:
    """Whether `tile` stands somewhere on the sheet, pixel by pixel."""
    corner = (sheet[: sheet.shape[0] - tile.shape[0] + 1, : sheet.shape[1] - tile.shape[1] + 1] == tile[0, 0]).all(-1)
    return any(
        np.array_equal(sheet[y : y + tile.shape[0], x : x + tile.shape[1]], tile) for y, x in np.argwhere(corner)
    )


def test_a_view_is_shown_pixel_by_pixel():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (view,) = views(Image.fromarray(array), TINY)
    assert np.array_equal(np.asarray(shown(view)), array)


def test_every_view_is_on_the_sheet_as_the_encoder_gets_it(tmp_path):
    image = photo(1280, 720)
    out = crop_sheet([("a.png", image)], FULL, tokens_of(FULL), tmp_path / "new" / "sheet.png")
    sheet = np.asarray(Image.open(out))
    found = [np.asarray(shown(view)) for view in views(image, FULL)]
    assert len(found) == 7 and all(contains(sheet, tile) for tile in found)
    assert sheet.shape[1] >= 3 * (504 + MARGIN)
    assert (sheet == GRID).all(-1).sum() > 2000


def test_small_views_are_enlarged_with_square_pixels(tmp_path):
    image = photo(96, 96)
    sheet = np.asarray(Image.open(crop_sheet([("a", image)], TINY, tokens_of(TINY), tmp_path / "s.png")))
    for view, factor in zip(views(image, TINY), (4, 4, 4, 4, 3)):
        assert contains(sheet, np.asarray(shown(view)).repeat(factor, 0).repeat(factor, 1))


def test_images_stand_one_below_the_other(tmp_path):
    one = Image.open(crop_sheet([("a", photo(64, 64))], TINY, tokens_of(TINY), tmp_path / "1.png"))
    other = Image.open(crop_sheet([("b", photo(64, 32))], TINY, tokens_of(TINY), tmp_path / "2.png"))
    both = crop_sheet([("a", photo(64, 64)), ("b", photo(64, 32))], TINY, tokens_of(TINY), tmp_path / "3.png")
    assert Image.open(both).size == (max(one.width, other.width), one.height + other.height)
    with pytest.raises(ValueError, match="no image"):
        crop_sheet([], TINY, tokens_of(TINY), tmp_path / "4.png")


@pytest.mark.parametrize("size", [(3024, 16), (15, 3000), (1, 1), (40, 3)])
def test_extreme_shapes_are_drawn(size, tmp_path):
    out = crop_sheet([("strip.png", photo(*size))], FULL, tokens_of(FULL), tmp_path / "s.png")
    assert max(Image.open(out).size) < 8000


@pytest.mark.parametrize(
    ("size", "spec"), [((1280, 720), FULL), ((64, 64), FULL), ((200, 100), TINY), ((33, 200), FULL)]
)
def test_the_caption_counts_what_the_processor_lays_out(size, spec):
    processor = Processor(template="plain").bind(spec, lambda side: -(-side // 4))
    prompt = Prompt(messages=[Message(role="user", content="<image>")], images=[photo(*size)])
    example = processor.encode_prompt(prompt)
    markup = len(processor.encode_prompt(Prompt(messages=[Message(role="user", content="")])).input_ids)
    line = caption("a.png", size, spec, tokens_of(spec))
    assert line.startswith(f"a.png: {size[0]}x{size[1]}, ")
    num_markers = len(example.input_ids) - markup - example.num_visual_tokens
    assert line.endswith(f"{example.num_visual_tokens} visual tokens and {num_markers} markers")
    assert ("no crops" in line) == (len(example.views) == 1)
    if size == (1280, 720):
        assert "6 crops in 2 rows of 3" in line
