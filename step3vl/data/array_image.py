"""A PIL image over pixels that a decoder has already laid out as an array, without a copy into PIL's own memory.

Resizing and cropping read the array (`pixels_of`); whatever else is done with the image makes PIL's copy first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class ArrayImage(Image.Image):
    """An RGB image of the pixels [H,W,3] uint8. The array must be contiguous and must not be written to any more.

    It behaves as any PIL image; its methods return plain ones. PIL's copy is made by `load`, which every method calls.
    """

    pixels: Pixels | None = None
    """The pixels, until PIL has its copy; None afterwards, since only the copy follows later changes."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.flags.c_contiguous:
            raise ValueError(f"ArrayImage takes contiguous uint8 [H,W,3], got {pixels.dtype} {list(pixels.shape)}")
        self._mode, self._size = "RGB", (pixels.shape[1], pixels.shape[0])
        self.pixels = pixels

    def load(self) -> Any:
        if self.pixels is not None:
            pixels, self.pixels = self.pixels, None
            self.im = Image.fromarray(pixels).im
        return super().load()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """numpy's door, read only: the array itself while there is one."""
        if self.pixels is None:
            return super().__array_interface__
        return {"shape": self.pixels.shape, "typestr": "|u1", "version": 3, "data": self.pixels.data.toreadonly()}


def pixels_of(image: Image.Image) -> Pixels:
    """Pixels [H,W,3] uint8 of an RGB image. They may be the image's own: only read them."""
    if isinstance(image, ArrayImage) and image.pixels is not None:
        return image.pixels
    return np.array(image)  # a copy of PIL's memory, which has four bytes a pixel
