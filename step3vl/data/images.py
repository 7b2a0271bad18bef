"""One image to the views an encoder sees: crops row by row, then the global view (STEP3-VL's multi-crop).

`plan` is the geometry alone, so that tokens can be counted before any pixel is touched; `views` carries it out.
The order of the cuts and every threshold are those of the released model's preprocessing. Pixels stay 8-bit, channels
innermost, up to the encoder, which normalises them on its own device; every view is within 3 of 255 levels of the
released order, which normalises first and resizes floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from step3vl.data.array_image import pixels_of
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
    """The views of one image, N x [3,H,W] uint8: crops row by row, then the global view.

    Crops are `crop_pixels` and the global view is `global_pixels` square; the aspect ratio is not kept. Any mode is
    brought to RGB with PIL's `convert("RGB")`: an alpha channel is dropped, not composited. `crops` may hand in a plan
    that is already known. Views may share memory with each other and with the image: do not write to them.
    """
    layout = spec.layout
    crops = crops or plan(*image.size, layout)
    if image.mode != "RGB":
        image = image.convert("RGB")
    whole = torch.from_numpy(pixels_of(image))  # [H,W,3] uint8
    if crops.square_pad:
        side = max(image.size)
        whole = _inside(whole, (0, 0, side, side))
    whole = _resized(whole, crops.global_resize)
    cut = _resized(whole, crops.snapped) if crops.boxes else whole
    pieces = [_resized(_inside(cut, box), (layout.crop_pixels, layout.crop_pixels)) for box in crops.boxes]
    pieces.append(_resized(whole, (layout.global_pixels, layout.global_pixels)))
    return [piece.permute(2, 0, 1) for piece in pieces]


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


def _inside(pixels: Tensor, box: Box) -> Tensor:
    """What of [H,W,3] lies in the box; black where the box reaches beyond the right or the lower edge."""
    x0, y0, x1, y1 = box
    height, width = pixels.shape[:2]
    piece = pixels[y0:y1, x0:x1]  # [h,w,3]
    return piece if y1 <= height and x1 <= width else pad(piece, (0, 0, 0, max(x1 - width, 0), 0, max(y1 - height, 0)))


def _resized(pixels: Tensor, size: Size) -> Tensor:
    """[H,W,3] uint8 at `size` (width, height): bilinear, antialiased, rounded; within 2 levels of PIL's resize."""
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    channels_first = pixels[None].permute(0, 3, 1, 2)  # [1,3,H,W]; this order of strides has torch's fast kernel
    out = interpolate(channels_first, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return out[0].permute(1, 2, 0)
