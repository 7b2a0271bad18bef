"""What the model sees of an image, as a picture: the crop grid on the image, the global view, and every crop.

Views are shown as the encoder receives them, so that lost detail, stretched sides and black padding show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from step3vl.data.corpus.assets import font
from step3vl.data.images import CropPlan, plan, views
from step3vl.types import ImageSpec

MARGIN, LINE = 12, 18
SMALLEST = 168
"""Views with fewer pixels a side are enlarged by a whole factor, with square pixels."""
WIDEST = 4096
"""Rows of crops that would be wider are scaled down."""
PAPER, INK, GRID = (250, 250, 250), (30, 30, 30), (255, 60, 0)


def crop_sheet(
    images: Sequence[tuple[str, Image.Image]], spec: ImageSpec, num_tokens: Callable[[int], int], out_png: str | Path
) -> Path:
    """Draw named RGB images, one below the other, to a PNG; returns its path.

    `num_tokens` maps the side of a view in pixels to its visual tokens.
    """
    if not images:
        raise ValueError("there is no image whose crops could be shown")
    panels = [_panel(name, image, spec, num_tokens) for name, image in images]
    width = max(panel.width for panel in panels)
    sheet = Image.new("RGB", (width, sum(panel.height for panel in panels)), PAPER)
    y = 0
    for panel in panels:
        sheet.paste(panel, (0, y))
        y += panel.height
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png, "PNG")
    return out_png


def caption(name: str, size: tuple[int, int], spec: ImageSpec, num_tokens: Callable[[int], int]) -> str:
    """Crops and tokens of an image of `size` (width, height) pixels, in one line."""
    crops = plan(*size, spec.layout)
    visual = crops.num_crops * num_tokens(spec.layout.crop_pixels) + num_tokens(spec.layout.global_pixels)
    markers = 2 * crops.num_crops + crops.num_newlines + 2
    rows = "1 row" if crops.grid[1] == 1 else f"{crops.grid[1]} rows"
    cut = f"{crops.num_crops} crops in {rows} of {crops.grid[0]}" if crops.num_crops else "no crops"
    return f"{name}: {size[0]}x{size[1]}, {cut}, {visual} visual tokens and {markers} markers"


def shown(view: Tensor) -> Image.Image:
    """A view [3,H,W] uint8 as an image."""
    return Image.fromarray(view.permute(1, 2, 0).numpy())


def _panel(name: str, image: Image.Image, spec: ImageSpec, num_tokens: Callable[[int], int]) -> Image.Image:
    layout = spec.layout
    crops = plan(*image.size, layout)
    *cut, whole = (shown(view) for view in views(image, spec, crops))
    whole = whole.resize(_enlarged(whole.size), Image.Resampling.NEAREST)
    drawn = _with_grid(image, crops, whole.height)
    columns = max(crops.grid[0], 1)
    side = min(_enlarged((layout.crop_pixels, layout.crop_pixels))[0], max((WIDEST - MARGIN) // columns - MARGIN, 8))
    title = caption(name, image.size, spec, num_tokens)
    width = max(drawn.width + whole.width + 3 * MARGIN, columns * (side + MARGIN) + MARGIN)
    width = max(width, round(font("DejaVuSans", 14).getlength(title)) + 2 * MARGIN)
    top = MARGIN + 2 * LINE
    below = top + whole.height + MARGIN + LINE
    height = below + crops.grid[1] * (side + MARGIN) + MARGIN if cut else top + whole.height + MARGIN
    panel = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((MARGIN, MARGIN), title, font=font("DejaVuSans", 14), fill=INK)
    x = drawn.width + 2 * MARGIN
    _label(draw, (MARGIN, top - LINE), "the image and its crops")
    _label(draw, (x, top - LINE), f"global view: {layout.global_pixels} px, {num_tokens(layout.global_pixels)} tokens")
    panel.paste(drawn, (MARGIN, top))
    panel.paste(whole, (x, top))
    if cut:
        tokens = num_tokens(layout.crop_pixels)
        _label(draw, (MARGIN, below - LINE), f"each crop: {layout.crop_pixels} px, {tokens} tokens")
    for k, crop in enumerate(cut):
        at = MARGIN + k % columns * (side + MARGIN), below + k // columns * (side + MARGIN)
        kind = Image.Resampling.NEAREST if side >= crop.width else Image.Resampling.LANCZOS
        panel.paste(crop.resize((side, side), kind), at)
    return panel


def _with_grid(image: Image.Image, crops: CropPlan, height: int) -> Image.Image:
    """The image at `height` or, when wide, twice as wide as high at most; boxes as they lie on what is cut."""
    if crops.square_pad:
        image = image.crop((0, 0, max(image.size), max(image.size)))
    scale = min(height / image.height, 2 * height / image.width)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    drawn = image.resize(size, kind)
    draw = ImageDraw.Draw(drawn)
    x_scale, y_scale = size[0] / crops.snapped[0], size[1] / crops.snapped[1]
    for x0, y0, x1, y1 in crops.boxes:
        box = (x0 * x_scale, y0 * y_scale, min(x1 * x_scale, size[0]) - 1, min(y1 * y_scale, size[1]) - 1)
        draw.rectangle((box[0], box[1], max(box[0], box[2]), max(box[1], box[3])), outline=GRID, width=2)
    return drawn


def _enlarged(size: tuple[int, int]) -> tuple[int, int]:
    factor = -(-SMALLEST // max(size)) if max(size) < SMALLEST else 1
    return size[0] * factor, size[1] * factor


def _label(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    draw.text(at, text, font=font("DejaVuSans", 11), fill=INK)
