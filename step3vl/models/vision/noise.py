"""A control for tables of encoders: features that say nothing about the image. What a row scores with it, others owe to
words and to chance.

Shapes: n images of one size, C channels, H/W pixels, h/w grid cells, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from step3vl.models.vision.base import HALF, VisionEncoder
from step3vl.types import ImageSpec, MultiCrop


class NoiseEncoder(VisionEncoder):
    """Normal noise through a LayerNorm, drawn anew at every look; it has no blocks, so nothing can be tapped.

    Args:
        hidden_size: width of the features.
        patch_size: side of a patch in pixels, for as many tokens as the encoder it stands for.
        layout: how an image becomes views.
    """

    def __init__(self, hidden_size: int, patch_size: int, layout: MultiCrop | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.image_spec = ImageSpec(patch_size, HALF, HALF, layout or MultiCrop())
        self.norm = nn.LayerNorm(hidden_size)

    def encode(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        height, width = (side // self.image_spec.patch_size for side in pixels.shape[-2:])
        noise = torch.randn(len(pixels), height, width, self.hidden_size, device=pixels.device, dtype=pixels.dtype)
        return self.norm(noise), []  # [n,h,w,D]

    def blocks(self) -> Sequence[nn.Module]:
        return []

    def init_weights(self) -> None:
        self.norm.reset_parameters()
