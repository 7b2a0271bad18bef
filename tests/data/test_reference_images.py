"""Pixels and token ids against a second, plain writing of the released preprocessing, on every worked size.

The released order normalises before its last resize and never rounds after it. Views in 8 bits round after every
resize, so they are compared in levels of 0 to 255; what needs no resize must come out exact.

The reference takes its geometry from the table of worked examples, cuts with array slices on a black canvas, and writes
the token layout out loop by loop.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from step3vl.data.decode import open_image
from step3vl.data.images import plan
from step3vl.data.processor import Processor
from step3vl.types import ImageSpec, Message, MultiCrop, Prompt

WORKED = json.loads((Path(__file__).parent / "step3vl_crops.json").read_text())
OVERHANG = {
    "width": 1000,
    "height": 490,
    "square_pad": False,
    "global_resize": [1000, 490],
    "window": 504,
    "grid": [2, 1],
    "snapped": [1008, 490],
    "num_crops": 2,
    "num_placeholders": 2 * 81 + 169,
    "num_tokens_with_markers": 2 * 83 + 171,
}
"""Crops that reach 14 px below the image, which the table does not have."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ROUNDING = 2.01
"""Levels of 255 by which a view may differ, since each of the two passes of a resize in 8 bits rounds once."""
SMALL = 600_000
"""Sizes up to this many pixels also go through the resize written out as matrices."""


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(template="chat").bind(ImageSpec(14, MEAN, STD, MultiCrop()), lambda side: -(-side // 4))


def photo(width: int, height: int) -> Image.Image:
    """Slow waves and hard noise, different in every channel and place."""
    rng = np.random.default_rng(width * 10_007 + height)
    x, y = np.arange(width) / 37, np.arange(height)[:, None] / 53
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * 0.3) * np.cos(y)], axis=2) * 90 + 128
    return Image.fromarray((waves + rng.integers(-30, 30, (height, width, 1))).clip(0, 255).astype(np.uint8))


def unit(array: np.ndarray) -> Tensor:
    """[H,W,3] uint8 -> [3,H,W]: to [0,1], then mean and deviation."""
    values = array.astype(np.float32) / np.float32(255)
    values = (values - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def levels(view: Tensor) -> Tensor:
    """Normalised -> 0 to 255."""
    return (view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def resized(view: Tensor, side: int) -> Tensor:
    if view.shape[1:] == (side, side):
        return view
    return interpolate(view[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]


def triangle(num_in: int, num_out: int) -> Tensor:
    """Antialiased bilinear resize of one axis as a matrix [out,in]: a tent as wide as the reduction, rows sum to 1."""
    scale = num_in / num_out
    centre = (torch.arange(num_out, dtype=torch.float64)[:, None] + 0.5) * scale
    place = torch.arange(num_in, dtype=torch.float64)[None] + 0.5
    weight = (1 - (place - centre).abs() / max(scale, 1.0)).clamp_min(0)
    return weight / weight.sum(dim=1, keepdim=True)


def pieces(image: Image.Image, case: dict) -> list[np.ndarray]:
    """Crops row by row, then the image of the global view; all [H,W,3] before the last resize."""
    if case["square_pad"]:
        side = max(image.size)
        canvas = np.zeros((side, side, 3), np.uint8)
        canvas[: image.height, : image.width] = np.asarray(image)
        image = Image.fromarray(canvas)
    image = image.resize(case["global_resize"], Image.Resampling.BILINEAR)
    window, (across, down) = case["window"], case["grid"]
    cut: list[np.ndarray] = []
    if window:
        whole = np.asarray(image.resize(case["snapped"], Image.Resampling.BILINEAR))
        canvas = np.zeros((down * window, across * window, 3), np.uint8)
        canvas[: whole.shape[0], : whole.shape[1]] = whole
        for row in range(down):
            for column in range(across):
                cut.append(canvas[row * window : (row + 1) * window, column * window : (column + 1) * window])
    return [*cut, np.asarray(image)]


def layout_ids(case: dict, token) -> list[int]:
    ids: list[int] = []
    across, down = case["grid"]
    for row in range(down):
        for _ in range(across):
            ids.append(token("<patch_start>"))
            ids.extend([token("<im_patch>")] * 81)
            ids.append(token("<patch_end>"))
        if row < down - 1:
            ids.append(token("<patch_newline>"))
    return [*ids, token("<im_start>"), *[token("<im_patch>")] * 169, token("<im_end>")]


@pytest.mark.parametrize("case", [*WORKED, OVERHANG], ids=lambda case: f"{case['width']}x{case['height']}")
def test_pixels_and_ids_equal_the_reference(case, processor):
    image = photo(case["width"], case["height"])
    prompt = Prompt(messages=[Message(role="user", content="<image>What is it?")], images=[image])
    example = processor.encode_prompt(prompt)
    expected = pieces(image, case)
    assert len(example.views) == len(expected) == case["num_crops"] + 1
    for k, (view, piece) in enumerate(zip(example.views, expected)):
        side = 728 if k == case["num_crops"] else 504
        assert view.shape == (3, side, side) and view.dtype == torch.uint8
        assert (view - levels(resized(unit(piece), side))).abs().max() <= ROUNDING, k
        if [*image.size] == case["global_resize"] == case["snapped"] and piece.shape[:2] == (side, side):
            assert np.array_equal(view.permute(1, 2, 0), piece), k
    tokenizer = processor.tokenizer
    text = tokenizer.markup("<|im_start|>user\n"), tokenizer.markup("What is it?<|im_end|>\n<|im_start|>assistant\n")
    assert example.input_ids.tolist() == [*text[0], *layout_ids(case, tokenizer.token_id), *text[1]]
    assert example.num_visual_tokens == case["num_placeholders"]
    assert len(example.input_ids) - len(text[0]) - len(text[1]) == case["num_tokens_with_markers"]


@pytest.mark.parametrize(
    "case",
    [c for c in WORKED if c["width"] * c["height"] < SMALL and c["grid"][0] < 5],
    ids=lambda case: f"{case['width']}x{case['height']}",
)
def test_the_last_resize_is_the_written_out_one(case, processor):
    image = photo(case["width"], case["height"])
    prompt = Prompt(messages=[Message(role="user", content="<image>")], images=[image])
    found = processor.encode_prompt(prompt).views
    expected = pieces(image, case)
    for view, piece in [(found[0], expected[0]), (found[-1], expected[-1])]:
        side = view.shape[1]
        vertical, horizontal = triangle(piece.shape[0], side), triangle(piece.shape[1], side)
        expected_view = vertical @ unit(piece).double() @ horizontal.T
        assert (view - levels(expected_view)).abs().max() <= ROUNDING


def odd_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """Encoded files in odd modes, and the upright 8-bit colours they stand for."""
    rng = np.random.default_rng(5)
    colours = np.asarray(photo(150, 90))
    grey, alpha = colours[..., 0], rng.integers(0, 256, (90, 150), dtype=np.uint8)
    numbers, palette = grey // 16, rng.integers(0, 256, (16, 3), dtype=np.uint8)
    indexed = Image.fromarray(numbers, "P")
    indexed.putpalette(palette.tobytes())
    deep = grey.astype(np.uint16) * 257
    cmyk = Image.fromarray(np.dstack([255 - colours, np.zeros_like(grey)]), "CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [indexed, indexed.transpose(Image.Transpose.ROTATE_180)]

    def save(image: Image.Image, format: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    grey_colours = np.repeat(grey[..., None], 3, axis=2)
    return {
        "L": (save(Image.fromarray(grey), "PNG"), grey_colours),
        "P": (save(indexed, "PNG", transparency=2), palette[numbers]),
        "RGBA": (save(Image.fromarray(np.dstack([colours, alpha]), "RGBA"), "PNG"), colours),
        "CMYK": (save(cmyk, "TIFF"), colours),
        "16-bit": (save(Image.fromarray(deep), "PNG"), grey_colours),
        "EXIF": (save(Image.fromarray(colours), "PNG", exif=turned), np.rot90(colours, -1)),
        "GIF": (save(frames[0], "GIF", save_all=True, append_images=frames[1:]), palette[numbers]),
    }


@pytest.mark.parametrize("mode", sorted(odd_files()))
def test_odd_modes_give_the_reference_pixels(mode, processor):
    data, colours = odd_files()[mode]
    image = open_image(data, mode)
    crops = plan(*image.size, MultiCrop())
    case = {name: getattr(crops, name) for name in ("square_pad", "global_resize", "window", "grid", "snapped")}
    prompt = Prompt(messages=[Message(role="user", content="<image>")], images=[image])
    expected = pieces(Image.fromarray(np.ascontiguousarray(colours)), case)
    found = processor.encode_prompt(prompt).views
    assert len(found) == len(expected) == 3  # a 90 px window twice, and the whole
    for view, piece in zip(found, expected):
        assert (view - levels(resized(unit(piece), view.shape[1]))).abs().max() <= ROUNDING
