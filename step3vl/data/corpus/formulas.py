"""Mathematics set by matplotlib's mathtext, as a mask to paste. About 9 ms a formula."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

TRAIN_MATHS = ("dejavusans", "dejavuserif", "cm", "stixsans")
HELD_OUT_MATHS = ("stix",)


@cache
def _parser() -> Any:
    from matplotlib.mathtext import MathTextParser

    return MathTextParser("agg")


def formula_mask(latex: str, family: str, dpi: int = 100) -> Image.Image:
    """The ink of a formula ("L", 255 where there is ink); `family` is one of the tuples above."""
    from matplotlib.font_manager import FontProperties

    parsed = _parser().parse(f"${latex}$", dpi, FontProperties(size=14, math_fontfamily=family))
    return Image.fromarray(np.asarray(parsed.image, dtype=np.uint8))
