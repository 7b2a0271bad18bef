"""One image to the views an encoder sees: crops row by row, then the global view (STEP3-VL's multi-crop).

`plan` is the geometry alone, so that tokens can be counted before any pixel is touched; `views` carries it out.
The order of the steps and every threshold are those of the released model's preprocessing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from step3vl.types import ImageSpec, MultiCrop

THIN = 4.0
"""Long over short side above which an image counts as thin."""
ELONGATED = 1.5
"""Long over short side above which an image no larger than the global view is still cropped."""
ROUND_UP = 0.2
"""A side is stretched to one more window when the part left over exceeds this share of a window."""

Size = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class CropPlan:
    """What will happen to an image. Sizes are (width, height), all in pixels.

    Example: plan(1280, 720, MultiCrop()) has window 504, grid (3, 2), snapped (1512, 1008): 6 crops, 1 newline.
    """

    square_pad: bool
    """The image is first padded to a square with black, the image at the top left."""
    global_resize: Size
    """Size after padding and after scaling down to the longest side allowed."""
    window: int
    """Side of a crop; 0: no crops."""
    grid: Size
    """Crops (in a row, in a column)."""
    snapped: Size
    """Size the image is brought to before it is cut."""
    boxes: tuple[Box, ...]
    """(x0, y0, x1, y1) of each crop in the snapped image, row by row."""

    @property
    def num_crops(self) -> int:
        return len(self.boxes)

    @property
    def num_newlines(self) -> int:
        """Newline tokens: one after every row of crops but the last."""
        return max(self.grid[1] - 1, 0)


def plan(width: int, height: int, layout: MultiCrop) -> CropPlan:
    """Geometry of an image of `width` x `height` pixels. Raises ValueError for an empty image."""
    if width < 1 or height < 1:
        raise ValueError(f"an image must have at least 1 x 1 pixels, got {width} x {height}")
    square_pad = min(width, height) < layout.min_side and max(width, height) / min(width, height) > THIN
    if square_pad:
        width = height = max(width, height)
    if max(width, height) > layout.max_side:
        scale = layout.max_side / max(width, height)
        width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    window = _window(max(width, height), min(width, height), layout)
    if not window:
        return CropPlan(square_pad, (width, height), 0, (0, 0), (width, height), ())
    snapped = (_snap(width, window), _snap(height, window))
    x_starts, y_starts = _starts(snapped[0], window), _starts(snapped[1], window)
    boxes = tuple((x, y, x + window, y + window) for y in y_starts for x in x_starts)
    return CropPlan(square_pad, (width, height), window, (len(x_starts), len(y_starts)), snapped, boxes)


def views(image: Image.Image, spec: ImageSpec, crops: CropPlan | None = None) -> list[Tensor]:
    """The views of one image, N x [3,H,W] float32, normalised: crops row by row, then the global view.

    Crops are `crop_pixels` and the global view is `global_pixels` square; the aspect ratio is not kept. Any mode is
    brought to RGB with PIL's `convert("RGB")`: an alpha channel is dropped, not composited. `crops` may hand in a plan
    that is already known.
    """
    layout = spec.layout
    crops = crops or plan(*image.size, layout)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if crops.square_pad:
        side = max(image.size)
        image = image.crop((0, 0, side, side))  # PIL fills what lies outside with black
    if image.size != crops.global_resize:
        image = image.resize(crops.global_resize, Image.Resampling.BILINEAR)
    cut = image
    if crops.boxes and image.size != crops.snapped:
        cut = image.resize(crops.snapped, Image.Resampling.BILINEAR)
    pieces = [_to_view(cut.crop(box), spec, layout.crop_pixels) for box in crops.boxes]
    return [*pieces, _to_view(image, spec, layout.global_pixels)]


def _window(long: int, short: int, layout: MultiCrop) -> int:
    if long <= layout.global_size:
        return short if long / short > ELONGATED else 0
    return min(short, layout.crop_size) if long / short > THIN else layout.crop_size


def _snap(side: int, window: int) -> int:
    """Whole windows nearest to `side`, rounding up above `ROUND_UP`; a side shorter than the window stays."""
    if side < window:
        return side
    left_over = side / window - side // window  # in floats on purpose: 660 / 300 leaves 0.2000...02, so 3 windows
    return window * (side // window + (left_over > ROUND_UP))


def _starts(side: int, window: int) -> list[int]:
    """Where the windows begin along one side; a single window may overhang a side shorter than itself (black there)."""
    return list(range(0, side, window))


def _to_view(image: Image.Image, spec: ImageSpec, pixels: int) -> Tensor:
    array = torch.from_numpy(np.array(image))  # [H,W,3] uint8
    view = array.permute(2, 0, 1).float().div_(255.0)  # [3,H,W]
    view.sub_(torch.tensor(spec.mean).view(3, 1, 1)).div_(torch.tensor(spec.std).view(3, 1, 1))
    if view.shape[1:] != (pixels, pixels):
        size = (pixels, pixels)
        view = interpolate(view[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return view.contiguous()
