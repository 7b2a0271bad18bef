"""The crop plan against worked examples of the released preprocessing, and the pixels against the definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from step3vl.data.array_image import ArrayImage
from step3vl.data.decode import open_image
from step3vl.data.images import plan, views
from step3vl.types import Grids, ImageSpec, MultiCrop
from tests.data.released_views import differences, jpeg, landscape, page

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
        assert view.dtype == torch.uint8
        assert torch.equal(view, torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 48, 48))
    whole = found[-1]
    for k, (x, y) in enumerate([(10, 16), (32, 16), (54, 16), (10, 48), (32, 48), (54, 48)]):
        assert whole[:, y, x].tolist() == list(colours[k])


SIZES = [(64, 64), (40, 30), (320, 200), (640, 480), (1920, 1080), (4000, 3000), (33, 200), (20, 300), (1000, 490)]


@pytest.mark.parametrize("draw", [landscape, page])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_view_is_within_three_levels_of_the_released_order(draw, size):
    spec = ImageSpec(14, *CLIP, FULL)
    data = jpeg(draw(*size))
    found = views(open_image(data, "x"), spec)
    crops = plan(*size, FULL)
    assert len(found) == crops.num_crops + 1 and all(view.dtype == torch.uint8 for view in found)
    assert max(differences(found, data, spec)) <= 3


@pytest.mark.parametrize("size", [(50, 40), (64, 64), (65, 64), (120, 90), (300, 200), (500, 100)])
def test_hard_noise_in_the_tiny_layout_is_as_close(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (*size, 3), dtype=np.uint8) * 255)
    spec = ImageSpec(4, *CLIP, TINY)
    assert max(differences(views(image, spec), image, spec)) <= 3
    assert max(differences(views(ArrayImage(np.array(image)), spec), image, spec)) <= 3


def test_what_is_not_resized_is_unchanged():
    array = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    *crops, _ = views(Image.fromarray(array), ImageSpec(4, *CLIP, TINY))
    for crop, (x0, y0, x1, y1) in zip(crops, plan(96, 96, TINY).boxes, strict=True):
        assert np.array_equal(crop.permute(1, 2, 0), array[y0:y1, x0:x1])


def test_crops_are_cut_without_copying_and_stacked_in_their_own_order():
    array = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    image = ArrayImage(array)
    *crops, whole = views(image, ImageSpec(4, *CLIP, TINY))
    first = array.__array_interface__["data"][0]
    assert [crop.data_ptr() - first for crop in crops] == [0, 48 * 3, 48 * 96 * 3, 48 * 96 * 3 + 48 * 3]
    assert image.pixels is array, "the image was not copied into PIL's memory"
    stacked = Grids.stack([*crops, whole]).tensors[0]  # [4,3,48,48]
    assert stacked.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(stacked, crops, strict=True))


def test_views_reach_the_encoder_at_their_own_sizes():
    spec = ImageSpec(4, *CLIP, MultiCrop(global_size=64, crop_size=48, max_side=288, global_view=80, crop_view=56))
    assert [view.shape[1] for view in views(Image.new("RGB", (96, 96)), spec)] == [56, 56, 56, 56, 80]


def test_thin_images_are_padded_with_black_at_the_bottom_or_right():
    (view,) = views(Image.new("RGB", (4, 60), (255, 255, 255)), ImageSpec(4, *PLAIN, TINY))
    assert view[:, :, 0].float().mean() > 0.9 * 255
    assert view[:, :, 16:].max() == 0


def test_a_window_beyond_the_edge_is_black_there():
    found = views(Image.new("RGB", (1000, 490), (255, 255, 255)), ImageSpec(14, *PLAIN, FULL))
    assert [view.shape[1] for view in found] == [504, 504, 728]
    for crop in found[:2]:
        assert crop[:, :490].min() == 255 and crop[:, 490:].max() == 0


def test_other_modes_become_rgb_and_alpha_is_dropped():
    image = Image.new("RGBA", (64, 64), (200, 100, 50, 0))
    (view,) = views(image, ImageSpec(4, *PLAIN, TINY))
    assert view[:, 0, 0].tolist() == [200, 100, 50]
    (grey,) = views(Image.new("L", (64, 64), 128), ImageSpec(4, *PLAIN, TINY))
    assert grey.shape == (3, 64, 64)
