"""The crop plan against worked examples of the released preprocessing, and the pixels against the definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from step3vl.data.images import plan, views
from step3vl.types import ImageSpec, MultiCrop

FULL = MultiCrop()
TINY = MultiCrop(global_size=64, crop_size=48, max_side=288, min_side=8)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
WORKED = json.loads((Path(__file__).parent / "step3vl_crops.json").read_text())


@pytest.mark.parametrize("case", WORKED, ids=lambda case: f"{case['width']}x{case['height']}")
def test_worked_example(case):
    crops = plan(case["width"], case["height"], FULL)
    assert crops.square_pad == case["square_pad"]
    assert list(crops.global_resize) == case["global_resize"]
    assert crops.window == case["window"]
    assert list(crops.grid) == case["grid"]
    assert list(crops.snapped) == case["snapped"]
    assert crops.num_crops == case["num_crops"] == len(crops.boxes)
    assert crops.num_newlines == case["num_newlines"]
    placeholders = 81 * crops.num_crops + 169
    assert placeholders == case["num_placeholders"]
    assert placeholders + 2 * crops.num_crops + crops.num_newlines + 2 == case["num_tokens_with_markers"]


def test_boxes_tile_the_snapped_image_row_by_row():
    crops = plan(1280, 720, FULL)
    assert crops.boxes[:2] == ((0, 0, 504, 504), (504, 0, 1008, 504))
    assert crops.boxes[3] == (0, 504, 504, 1008)
    covered = np.zeros(crops.snapped[::-1], int)
    for x0, y0, x1, y1 in crops.boxes:
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all()


def test_a_side_shorter_than_the_window_stays_and_the_crop_overhangs():
    crops = plan(1000, 490, FULL)  # long / short is 2.04: the window is 504, wider than the short side
    assert crops.snapped == (1008, 490)
    assert crops.boxes == ((0, 0, 504, 504), (504, 0, 1008, 504))


@pytest.mark.parametrize(
    ("size", "window", "grid"),
    [
        ((64, 64), 0, (0, 0)),
        ((65, 64), 48, (2, 2)),
        ((64, 32), 32, (2, 1)),
        ((96, 96), 48, (2, 2)),
        ((200, 100), 48, (4, 2)),
    ],
)
def test_tiny_layout_has_the_same_structure(size, window, grid):
    crops = plan(*size, TINY)
    assert (crops.window, crops.grid) == (window, grid)


def test_very_long_images_keep_a_pixel():
    assert plan(100_000, 32, FULL).global_resize == (3024, 1)
    with pytest.raises(ValueError, match="at least 1 x 1 pixels, got 0 x 5"):
        plan(0, 5, FULL)


def test_views_come_row_by_row_and_then_the_whole():
    colours = [(10 * k, 5 * k, 255 - 10 * k) for k in range(6)]
    image = Image.new("RGB", (3 * 48, 2 * 48))
    for k, colour in enumerate(colours):
        image.paste(colour, (k % 3 * 48, k // 3 * 48, k % 3 * 48 + 48, k // 3 * 48 + 48))
    found = views(image, ImageSpec(4, *PLAIN, TINY))
    assert [tuple(view.shape) for view in found] == [(3, 48, 48)] * 6 + [(3, 64, 64)]
    for view, colour in zip(found, colours):
        expected = (torch.tensor(colour) / 255.0).view(3, 1, 1).expand(3, 48, 48)
        torch.testing.assert_close(view, expected)
    whole = found[-1]
    for k, (x, y) in enumerate([(10, 16), (32, 16), (54, 16), (10, 48), (32, 48), (54, 48)]):
        torch.testing.assert_close(whole[:, y, x], torch.tensor(colours[k]) / 255.0, atol=1e-5, rtol=0)


def test_pixels_are_scaled_normalised_then_resized_with_antialiasing():
    array = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    (view,) = views(Image.fromarray(array), ImageSpec(4, *CLIP, TINY))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in CLIP)
    unit = (torch.from_numpy(array).permute(2, 0, 1) / 255.0 - mean) / std
    expected = interpolate(unit[None], size=(64, 64), mode="bilinear", antialias=True, align_corners=False)[0]
    assert view.dtype == torch.float32
    torch.testing.assert_close(view, expected)


def test_views_reach_the_encoder_at_their_own_sizes():
    spec = ImageSpec(4, *CLIP, MultiCrop(global_size=64, crop_size=48, max_side=288, global_view=80, crop_view=56))
    assert [view.shape[1] for view in views(Image.new("RGB", (96, 96)), spec)] == [56, 56, 56, 56, 80]


def test_thin_images_are_padded_with_black_at_the_bottom_or_right():
    (view,) = views(Image.new("RGB", (4, 60), (255, 255, 255)), ImageSpec(4, *PLAIN, TINY))
    assert view[:, :, 0].mean() > 0.9
    assert view[:, :, 16:].abs().max() == 0.0


def test_other_modes_become_rgb_and_alpha_is_dropped():
    image = Image.new("RGBA", (64, 64), (200, 100, 50, 0))
    (view,) = views(image, ImageSpec(4, *PLAIN, TINY))
    torch.testing.assert_close(view[:, 0, 0], torch.tensor([200.0, 100.0, 50.0]) / 255)
    (grey,) = views(Image.new("L", (64, 64), 128), ImageSpec(4, *PLAIN, TINY))
    assert grey.shape == (3, 64, 64)
