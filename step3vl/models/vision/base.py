"""What every vision encoder offers: it owns what it needs from pixels and returns grids of features.

Adding an encoder is one subclass (`encode`, `blocks`, `init_weights`) and one card.

Shapes: n images of one size, C channels, H/W pixels, h/w grid cells, D feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from step3vl.models.flops import matrix_size
from step3vl.types import Grids, ImageSpec, MultiCrop

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of Meta's PE-lang and of SigLIP 2: pixels between -1 and 1."""


def step_layout(patch_size: int) -> MultiCrop:
    """STEP3-VL's cuts, seen at 52 and 36 patches a side: as many visual tokens as PE-lang with any patch size."""
    return MultiCrop(global_view=52 * patch_size, crop_view=36 * patch_size)


class VisionFeatures(NamedTuple):
    """`final`: features [n,h,w,D] of each size. `taps`: the same after each block that was asked for, in that order."""

    final: Grids
    taps: list[Grids]


class VisionEncoder(nn.Module, ABC):
    """Turns images into grids of features. The constructor gives shape; it never loads weights."""

    hidden_size: int
    """D, the width of the features."""
    image_spec: ImageSpec
    """How images are cut for this encoder, and what it normalises their pixels with."""

    num_prefix: int = 0
    """Tokens beside the patches: class token, registers."""

    @abstractmethod
    def encode(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Encode images of one size.

        Args:
            pixels: [n,C,H,W], normalised; H and W are multiples of the patch size.
            taps: numbers of blocks, each from 0 to len(blocks()) - 1.

        Returns:
            The final features [n,h,w,D] and, for each tap, the output of that block [n,h,w,D].
        """

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, in order: units of sharding and of recomputation."""

    @abstractmethod
    def init_weights(self) -> None:
        """Draw all weights afresh and recompute all buffers; also while some or all are on the meta device."""

    def flops(self, height: int, width: int) -> float:
        """FLOPs of the forward of one view of `height` x `width` patches: every block's matrices, global attention."""
        num_tokens = height * width + self.num_prefix
        embed = 2 * height * width * self.hidden_size * 3 * self.image_spec.patch_size**2
        linear = 2 * num_tokens * matrix_size(self.blocks())
        return embed + linear + len(self.blocks()) * 4 * num_tokens**2 * self.hidden_size

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [n,C,H,W] as `encode` takes them, made on the device where they are.

        8-bit pixels are divided by 255, then `image_spec`'s mean is taken away and the rest divided by its deviation,
        in float32; the result has the dtype of the weights. Floats are taken as normalised already.
        """
        if pixels.is_floating_point():
            return pixels
        unit = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)  # [n,C,H,W]
        for channel, mean, std in zip(unit.unbind(1), self.image_spec.mean, self.image_spec.std, strict=True):
            channel.sub_(mean).div_(std)  # plain numbers: a tensor would have to be copied to the device
        return unit.to(next(self.parameters()).dtype)

    def forward(self, images: Grids, taps: Sequence[int] = ()) -> VisionFeatures:
        """Encode images of several sizes, each size in one go.

        Args:
            images: pixels [n,C,H,W], uint8 as they were decoded, or floats that are normalised already.
            taps: numbers of blocks whose output is wanted too.

        Raises:
            ValueError: an image side is not a multiple of the patch size, or a tap names no block.
        """
        patch, num_blocks, name = self.image_spec.patch_size, len(self.blocks()), type(self).__name__
        for pixels in images.tensors:
            for side in pixels.shape[-2:]:
                if side % patch:
                    raise ValueError(
                        f"an image side of {side} pixels is not a multiple of patch_size {patch} of {name}"
                    )
        for tap in taps:
            if not 0 <= tap < num_blocks:
                raise ValueError(f"tap {tap} names no block of {name}: accepted are 0 to {num_blocks - 1}")
        outputs = [self.encode(self.normalised(pixels), taps) for pixels in images.tensors]
        final = Grids(tuple(last for last, _ in outputs), images.order)
        tapped = [Grids(tuple(kept[k] for _, kept in outputs), images.order) for k in range(len(taps))]
        return VisionFeatures(final, tapped)
