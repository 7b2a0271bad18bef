"""The released model's own order of preprocessing, in floats: PIL decodes and resizes, then normalise, then resize.

Plain and slow. What the 8-bit path gives is held against it, in tests and in benchmarks.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from step3vl.data.images import plan
from step3vl.types import ImageSpec


def released_views(image: Image.Image | bytes, spec: ImageSpec) -> list[Tensor]:
    """Views of an RGB image or of encoded bytes, N x [3,H,W] float32, normalised: crops, then the global view."""
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image)).convert("RGB")
    crops = plan(*image.size, spec.layout)
    if crops.square_pad:
        image = image.crop((0, 0, max(image.size), max(image.size)))
    if image.size != crops.global_resize:
        image = image.resize(crops.global_resize, Image.Resampling.BILINEAR)
    cut = image
    if crops.boxes and image.size != crops.snapped:
        cut = image.resize(crops.snapped, Image.Resampling.BILINEAR)
    pieces = [_view(cut.crop(box), spec, spec.layout.crop_pixels) for box in crops.boxes]
    return [*pieces, _view(image, spec, spec.layout.global_pixels)]


def _view(image: Image.Image, spec: ImageSpec, side: int) -> Tensor:
    view = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255.0)  # [3,H,W]
    view.sub_(torch.tensor(spec.mean).view(3, 1, 1)).div_(torch.tensor(spec.std).view(3, 1, 1))
    if view.shape[1:] != (side, side):
        view = interpolate(view[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False)[0]
    return view.contiguous()


def levels(view: Tensor, spec: ImageSpec) -> Tensor:
    """A normalised view [3,H,W] in levels of 0 to 255 again, not rounded."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (view * std + mean) * 255


def differences(views: list[Tensor], image: Image.Image | bytes, spec: ImageSpec) -> list[float]:
    """For each view uint8 [3,H,W], the largest distance in levels from the released order's."""
    released = released_views(image, spec)
    if [view.shape for view in views] != [view.shape for view in released]:
        raise ValueError("the views differ in number or size from the released order's")
    return [float((view - levels(other, spec)).abs().max()) for view, other in zip(views, released)]


# ------------------------------------------------------------------------------------------------ pictures


def landscape(width: int, height: int) -> Image.Image:
    """Like a photo: noise at four scales, so that a JPEG of it has about as many bytes as one from a camera."""
    rng = np.random.default_rng(width * 10_007 + height)
    pixels = np.full((height, width, 3), 128, np.float32)
    for cell, strength in ((4, 8), (16, 16), (64, 30), (256, 40)):
        noise = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32) * strength
        for channel in range(3):
            grown = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(grown)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def page(width: int, height: int) -> Image.Image:
    """Like a text: black strokes one to three pixels wide on white, and some in full colours."""
    rng = np.random.default_rng(width * 10_007 + height)
    pixels = np.full((height, width, 3), 255, np.uint8)
    for y in range(4, height - 8, 14):
        for x in range(4, width - 8, 7):
            ink = (0, 0, 0) if rng.random() < 0.9 else rng.choice([0, 255], 3)
            across, down, thick = rng.integers(0, 5), rng.integers(0, 8), rng.integers(1, 4)
            pixels[y : y + 9, x + across : x + across + thick] = ink
            pixels[y + down : y + down + thick, x : x + 5] = ink
    return Image.fromarray(pixels)


def jpeg(image: Image.Image, **options: int | str | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()
