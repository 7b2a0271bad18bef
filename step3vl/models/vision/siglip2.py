"""SigLIP 2: the contrastive encoder of many vision-language models, for comparison with PE-lang (Table 4's question).

Two forms of one ViT with learned absolute positions, biases everywhere and a last LayerNorm, without class token:
checkpoints of one resolution, and NaFlex checkpoints for any aspect ratio. Both wrap transformers' modules and keep the
parameter names of the released weights; the attention-pool head is left out.

Shapes: n images of one size, C channels, H/W pixels, h/w grid cells, L = h*w patches, D width, p side of a patch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from step3vl.models.attention import NAME, register
from step3vl.models.vision.base import HALF, VisionEncoder, step_layout
from step3vl.types import ImageSpec, MultiCrop, Triple


class _SigLIP(VisionEncoder):
    """What both forms share; only the embedding of patches differs.

    The final features have passed the last LayerNorm; taps, as raw block outputs, have not.

    Args:
        hidden_size: width of the features.
        num_layers: number of blocks.
        num_heads: attention heads.
        intermediate_size: width inside the MLP.
        grid_size: side of the learned position table in patches: image side / patch size of fixed-resolution weights,
            16 for the NaFlex weights.
        patch_size: side of a patch in pixels.
        mean: channel means that pixels are normalised with.
        std: channel deviations that pixels are normalised with.
        layout: how an image becomes views; None: STEP3-VL's cuts, 52 and 36 patches a side.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        grid_size: int,
        patch_size: int = 16,
        mean: Triple = HALF,
        std: Triple = HALF,
        layout: MultiCrop | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.hidden_size = hidden_size
        self.grid_size = grid_size
        self.image_spec = ImageSpec(patch_size, mean, std, layout or step_layout(patch_size))
        self.model = self.build(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            patch_size=patch_size,
            vision_use_head=False,
        )
        register()
        self.model.set_attn_implementation(NAME)  # one document an image: plain attention, as PE-lang's

    @abstractmethod
    def build(self, **config: Any) -> Any:
        """transformers' model of this form."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels [n,C,H,W] -> patch embeddings with positions [n,L,D]."""

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.encoder.layers)

    def init_weights(self) -> None:
        self.model.apply(self.model._init_weights)

    def encode(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        grid = tuple(side // self.image_spec.patch_size for side in pixels.shape[-2:])
        x = self.embed(pixels)
        kept: dict[int, Tensor] = {}
        for number, block in enumerate(self.model.encoder.layers):
            x = block(x, None)  # no mask: images of one size have no padding
            if number in taps:
                kept[number] = x.unflatten(1, grid)
        return self.model.post_layernorm(x).unflatten(1, grid), [kept[tap] for tap in taps]  # [n,h,w,D]


class SigLIP2(_SigLIP):
    """SigLIP 2 trained at one resolution. Other sizes work: the position table is interpolated (bicubic)."""

    def build(self, **config: Any) -> Any:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionModel(SiglipVisionConfig(image_size=self.grid_size * config["patch_size"], **config))

    def embed(self, pixels: Tensor) -> Tensor:
        return self.model.embeddings(pixels, interpolate_pos_encoding=True)


class SigLIP2NaFlex(_SigLIP):
    """SigLIP 2 for native aspect ratios (NaFlex): positions are resized to each grid, bilinear with antialiasing."""

    def build(self, **config: Any) -> Any:
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        return Siglip2VisionModel(Siglip2VisionConfig(num_patches=self.grid_size**2, **config))

    def embed(self, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.image_spec.patch_size)  # [n,h,w,p*p*C]
        shape = torch.tensor([patches.shape[1:3]])  # [1,2] on the CPU: its numbers are read there
        embeddings = self.model.embeddings
        table = embeddings.position_embedding.weight.unflatten(0, (self.grid_size, self.grid_size))
        positions = embeddings.resize_positional_embeddings(table, shape, max_length=int(shape.prod()))  # [1,L,D]
        return embeddings.patch_embedding(patches.flatten(1, 2)) + positions


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Pixels [n,C,H,W] -> patches [n,h,w,p*p*C], each a row of pixels in reading order with channels innermost."""
    cells = pixels.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))  # [n,C,h,p,w,p]
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3)
