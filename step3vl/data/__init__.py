"""From stored samples to packed batches: shards, mixture, processor (template, tokens, crops), packing, collation.

Paper: the data and image-preprocessing sections of STEP3-VL-10B. `docs/data_format.md` describes what is stored.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step3vl.data.crops import CropRecipe as CropRecipe
    from step3vl.data.image_data import CropData as CropData
    from step3vl.data.image_data import PairData as PairData
    from step3vl.data.mixture import Mixture as Mixture
    from step3vl.data.mixture import Source as Source
    from step3vl.data.module import TrainData as TrainData
    from step3vl.data.processor import Processor as Processor
    from step3vl.data.prompts import PromptData as PromptData
    from step3vl.data.tokenizer import load_tokenizer as load_tokenizer

_EXPORTS = {
    "CropData": "step3vl.data.image_data",
    "CropRecipe": "step3vl.data.crops",
    "Mixture": "step3vl.data.mixture",
    "PairData": "step3vl.data.image_data",
    "Processor": "step3vl.data.processor",
    "PromptData": "step3vl.data.prompts",
    "Source": "step3vl.data.mixture",
    "TrainData": "step3vl.data.module",
    "load_tokenizer": "step3vl.data.tokenizer",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
    return getattr(import_module(_EXPORTS[name]), name)
