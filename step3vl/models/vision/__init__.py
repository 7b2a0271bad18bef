"""Vision encoders: pixels in, a grid of features out. One file an encoder, one interface (`base.py`).

Exports are lazy: transformers is imported only when an encoder that needs it is built.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step3vl.models.vision.base import VisionEncoder, VisionFeatures
    from step3vl.models.vision.dinov3 import DINOv3
    from step3vl.models.vision.pe_lang import PELang
    from step3vl.models.vision.siglip2 import SigLIP2, SigLIP2NaFlex

__all__ = ["DINOv3", "PELang", "SigLIP2", "SigLIP2NaFlex", "VisionEncoder", "VisionFeatures"]

_HOME = {
    "DINOv3": "step3vl.models.vision.dinov3",
    "PELang": "step3vl.models.vision.pe_lang",
    "SigLIP2": "step3vl.models.vision.siglip2",
    "SigLIP2NaFlex": "step3vl.models.vision.siglip2",
    "VisionEncoder": "step3vl.models.vision.base",
    "VisionFeatures": "step3vl.models.vision.base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
