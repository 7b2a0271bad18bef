"""Images whose content is in contrast, not in brightness: a control for what a vision encoder is needed for.

A block of pixels is drawn as grey plus or minus an amount that says how bright the picture is there; the sign is drawn
anew for every block. The mean over signs is the same grey whatever is shown, and so is that of any linear map of the
pixels: nearly linear features, such as those of random weights, leave all the work to what comes after the encoder.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

GREY, LEAST = 127.5, 0.5
"""Middle of the range, and the amount (share of half of the range) that stands for black; white is 1."""


def second_order(image: Image.Image, rng: random.Random, block: int) -> Image.Image:
    """The image with blocks of `block` x `block` pixels above or below grey; channels of a block share its sign.

    Invertible up to rounding: brightness (0 to 1) is (|value - GREY| / GREY - LEAST) / (1 - LEAST), channel by channel.
    """
    height, width = image.height, image.width
    num = -(-height // block), -(-width // block)
    bits = np.random.default_rng(rng.getrandbits(64)).integers(0, 2, num)  # [rows,columns]
    signs = (2.0 * bits - 1).repeat(block, 0).repeat(block, 1)[:height, :width, None]  # [h,w,1]
    brightness = np.asarray(image.convert("RGB"), np.float32) / 255  # [h,w,3]
    values = GREY + GREY * signs * (LEAST + (1 - LEAST) * brightness)
    return Image.fromarray(np.rint(values).astype(np.uint8))
