"""The model room: vision encoder, projector, decoder, and the vision-language model that joins them.

Implements the architecture part of the STEP3-VL report. Exports are lazy: a class, and what it needs, is
imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step3vl.models.decoder import LanguageDecoder, Qwen3Decoder
    from step3vl.models.deepstack import DeepStack
    from step3vl.models.projector import ConvProjector, Projector
    from step3vl.models.value import ValueModel
    from step3vl.models.vlm import VisionLanguageModel

_HOME = {
    "ConvProjector": "step3vl.models.projector",
    "DeepStack": "step3vl.models.deepstack",
    "LanguageDecoder": "step3vl.models.decoder",
    "Projector": "step3vl.models.projector",
    "Qwen3Decoder": "step3vl.models.decoder",
    "ValueModel": "step3vl.models.value",
    "VisionLanguageModel": "step3vl.models.vlm",
}

__all__ = [
    "ConvProjector",
    "DeepStack",
    "LanguageDecoder",
    "Projector",
    "Qwen3Decoder",
    "ValueModel",
    "VisionLanguageModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
