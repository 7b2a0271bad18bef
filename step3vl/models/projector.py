"""From the encoder's grid to the decoder's tokens: the convolutional projector of STEP3-VL (report: architecture).

Shapes: n images of one size, h/w grid cells, D width of the encoder, E width of the decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from step3vl.models.flops import matrix_size


class Projector(nn.Module, ABC):
    """Maps features [n,h,w,D] to decoder embeddings [n,h',w',E]. Built by the model, which knows both widths."""

    downsample: int
    """Grid cells a side that become one token."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """[n,h,w,D] -> [n,grid(h),grid(w),E]."""

    @staticmethod
    @abstractmethod
    def grid(side: int) -> int:
        """How many tokens a side come out when `side` grid cells go in."""

    def flops(self, height: int, width: int) -> float:
        """FLOPs of the forward of one view of `height` x `width` grid cells, every matrix once for each token made.

        To be overridden where that is not so.
        """
        return 2.0 * self.grid(height) * self.grid(width) * matrix_size([self])

    @abstractmethod
    def init_weights(self) -> None:
        """Draw all weights afresh, for example after construction on the meta device."""


class ConvProjector(Projector):
    """Two stride-2 convolutions that double the width, then a linear map: 16 times fewer tokens.

    No activation lies between or after them, as in the released model. 52x52 cells give 13x13 = 169 tokens.

    Args:
        vision_size: width of the encoder's features.
        text_size: width of the decoder's embeddings.
        bias: whether the last linear map has a bias.
    """

    downsample = 4

    def __init__(self, vision_size: int, text_size: int, bias: bool = False) -> None:
        super().__init__()
        self.vit_downsampler1 = nn.Conv2d(vision_size, 2 * vision_size, kernel_size=3, stride=2, padding=1)
        self.vit_downsampler2 = nn.Conv2d(2 * vision_size, 4 * vision_size, kernel_size=3, stride=2, padding=1)
        self.vit_large_projector = nn.Linear(4 * vision_size, text_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.vit_large_projector(self.condense(features))

    def condense(self, features: Tensor) -> Tensor:
        """The convolutions alone: [n,h,w,D] -> [n,h',w',4D]."""
        maps = features.permute(0, 3, 1, 2)  # [n,D,h,w]
        return self.vit_downsampler2(self.vit_downsampler1(maps)).permute(0, 2, 3, 1)

    @staticmethod
    def grid(side: int) -> int:
        """A quarter, rounded up: each of the two convolutions halves the side and rounds up."""
        return (side + 3) // 4

    def flops(self, height: int, width: int) -> float:
        half = -(-height // 2) * -(-width // 2)
        quarter = self.grid(height) * self.grid(width)
        last = matrix_size([self.vit_downsampler2]) + matrix_size([self.vit_large_projector])
        return 2.0 * (half * matrix_size([self.vit_downsampler1]) + quarter * last)

    def init_weights(self) -> None:
        for module in (self.vit_downsampler1, self.vit_downsampler2, self.vit_large_projector):
            module.reset_parameters()
