"""DeepStack: features of inner encoder layers, added to the decoder's hidden states after its first layers (Table 6).

STEP3-VL report, Table 6: the loss falls faster, no benchmark gains, and the report leaves it out. How it was built
there is not given; ours follows Qwen3-VL: one merger a level, from a depth of the encoder to a layer of the decoder.

Shapes: n images of one size, h/w grid cells, h'/w' = a quarter of them rounded up, D width of the encoder, E width of
the decoder, V visual tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.models.flops import matrix_size
from step3vl.types import Grids

STRIDE = 4  # grid cells a side that become one token, as in the projector


class Merger(nn.Module):
    """Features [n,h,w,D] -> tokens [n,h',w',E]. `last` is the linear map that ends it and starts at zero."""

    last: nn.Linear

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()


class PoolMerger(Merger):
    """4x4 average pool, LayerNorm, MLP: 23.1M parameters at full size. Cells past the edge are left out of the mean."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__(vision_size, text_size)
        self.norm = nn.LayerNorm(vision_size)
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.last = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        maps = features.permute(0, 3, 1, 2)  # [n,D,h,w]
        pooled = F.avg_pool2d(maps, STRIDE, STRIDE, ceil_mode=True).permute(0, 2, 3, 1)  # [n,h',w',D]
        return self.last(F.gelu(self.linear_1(self.norm(pooled))))


class UnshuffleMerger(Merger):
    """The 16 cells of a token side by side, LayerNorm, linear map: 100.7M at full size. Cells past the edge are 0."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__(vision_size, text_size)
        self.norm = nn.LayerNorm(STRIDE * STRIDE * vision_size)
        self.last = nn.Linear(STRIDE * STRIDE * vision_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[1:3]
        padded = F.pad(features, (0, 0, 0, -width % STRIDE, 0, -height % STRIDE))
        cells = padded.unflatten(2, (-1, STRIDE)).unflatten(1, (-1, STRIDE))  # [n,h',4,w',4,D]
        return self.last(self.norm(cells.transpose(2, 3).flatten(3)))


class ConvMerger(Merger):
    """The projector once more: two stride-2 convolutions and a linear map: 237.5M parameters at full size."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__(vision_size, text_size)
        self.vit_downsampler1 = nn.Conv2d(vision_size, 2 * vision_size, kernel_size=3, stride=2, padding=1)
        self.vit_downsampler2 = nn.Conv2d(2 * vision_size, 4 * vision_size, kernel_size=3, stride=2, padding=1)
        self.last = nn.Linear(4 * vision_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        maps = features.permute(0, 3, 1, 2)  # [n,D,h,w]
        return self.last(self.vit_downsampler2(self.vit_downsampler1(maps)).permute(0, 2, 3, 1))


_MERGERS: dict[str, type[Merger]] = {"pool_mlp": PoolMerger, "unshuffle": UnshuffleMerger, "conv": ConvMerger}


class DeepStack(nn.Module):
    """One merger a level. The last linear map of each starts at zero, so that at step 0 the model is unchanged.

    Args:
        vision_size: width of the encoder's features.
        text_size: width of the decoder's hidden states.
        taps: for each level, the encoder block whose output is used; blocks count from 0. One block may serve several
            levels, as in the control that has DeepStack's parameters without its inner layers.
        inject_after: for each level, the decoder layer after which it is added; layers count from 0.
        merger: "pool_mlp" (4x4 average pool, LayerNorm, MLP), "unshuffle" (4x4 cells side by side, LayerNorm, linear
            map) or "conv" (as the projector). All round a grid that is no multiple of 4 up, as the projector does.
    """

    def __init__(
        self,
        vision_size: int,
        text_size: int,
        taps: Sequence[int] = (11, 23, 35),
        inject_after: Sequence[int] = (0, 1, 2),
        merger: Literal["pool_mlp", "unshuffle", "conv"] = "pool_mlp",
    ) -> None:
        super().__init__()
        if not taps or len(taps) != len(inject_after):
            raise ValueError(
                f"taps {list(taps)} and inject_after {list(inject_after)} must be of one length, at least 1"
            )
        if min(taps) < 0:
            raise ValueError(f"taps is {list(taps)}; accepted are numbers from 0")
        if min(inject_after) < 0 or len(set(inject_after)) != len(inject_after):
            raise ValueError(f"inject_after is {list(inject_after)}; accepted are different numbers from 0")
        if merger not in _MERGERS:
            raise ValueError(f"merger is {merger!r}; accepted are {', '.join(map(repr, _MERGERS))}")
        self.taps, self.inject_after = tuple(taps), tuple(inject_after)
        self.mergers = nn.ModuleList([_MERGERS[merger](vision_size, text_size) for _ in taps])
        self._zero_last()

    def forward(self, tapped: Sequence[Grids]) -> list[Tensor]:
        """Features of each tap -> tokens [V,E] of each level, in the order of the visual tokens in the text."""
        levels = []
        for merger, grids in zip(self.mergers, tapped, strict=True):
            views = grids.map(merger).unstack()  # each [h',w',E]
            levels.append(torch.cat([view.flatten(0, 1) for view in views]))
        return levels

    def flops(self, height: int, width: int) -> float:
        """FLOPs of the forward of one view of `height` x `width` grid cells, over all levels."""
        half = -(-height // 2) * -(-width // 2)
        tokens = self.grid(height) * self.grid(width)
        total = 0.0
        for merger in self.mergers:
            first = [merger.vit_downsampler1] if isinstance(merger, ConvMerger) else []
            total += 2.0 * (half - tokens) * matrix_size(first) + 2.0 * tokens * matrix_size([merger])
        return total

    @staticmethod
    def grid(side: int) -> int:
        """How many tokens a side come out when `side` grid cells go in: a quarter, rounded up."""
        return -(-side // STRIDE)

    def init_weights(self) -> None:
        """Draw all weights afresh, for example after construction on the meta device; the last ones are zero."""
        for module in self.mergers.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self._zero_last()

    def _zero_last(self) -> None:
        for merger in self.mergers:
            for weight in cast(Merger, merger).last.parameters():
                nn.init.zeros_(weight)
