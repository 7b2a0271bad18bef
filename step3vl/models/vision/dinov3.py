"""DINOv3 ViT: the self-supervised encoder that STEP3-VL's Table 4 sets against PE-lang.

Wraps transformers' model. The random stretching of rotary coordinates that DINOv3 pre-training uses is off: inside a
vision-language model the same image must give the same features.

Shapes: n images of one size, C channels, H/W pixels, h/w grid cells, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from step3vl.models.attention import NAME, register
from step3vl.models.vision.base import IMAGENET_MEAN, IMAGENET_STD, VisionEncoder, step_layout
from step3vl.types import ImageSpec, MultiCrop, Triple


class DINOv3(VisionEncoder):
    """DINOv3 Vision Transformer; features are the patch tokens, without class and register tokens.

    The final features have passed the last LayerNorm; taps, as raw block outputs, have not. Any image size that the
    patch size divides works: positions are rotary and scale with the image.

    Args:
        hidden_size: width of the features.
        num_layers: number of blocks.
        num_heads: attention heads.
        intermediate_size: width inside the MLP.
        use_gated_mlp: SwiGLU instead of GELU, as in the S+, H+ and 7B models.
        use_query_bias: whether the query projection has a bias: not in the 7B model. The key's never has one.
        use_value_bias: whether the value projection has a bias: not in the 7B model.
        patch_size: side of a patch in pixels.
        num_registers: register tokens.
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
        use_gated_mlp: bool = False,
        use_query_bias: bool = True,
        use_value_bias: bool = True,
        patch_size: int = 16,
        num_registers: int = 4,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        layout: MultiCrop | None = None,
    ) -> None:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        super().__init__()
        if hidden_size % num_heads or hidden_size // num_heads % 4:
            raise ValueError(
                f"hidden_size {hidden_size} over num_heads {num_heads} must be a whole multiple of 4 channels a head"
            )
        self.hidden_size = hidden_size
        self.num_prefix = 1 + num_registers
        self.image_spec = ImageSpec(patch_size, mean, std, layout or step_layout(patch_size))
        self.model = DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                intermediate_size=intermediate_size,
                use_gated_mlp=use_gated_mlp,
                hidden_act="silu" if use_gated_mlp else "gelu",
                query_bias=use_query_bias,
                value_bias=use_value_bias,
                patch_size=patch_size,
                num_register_tokens=num_registers,
                pos_embed_shift=None,
                pos_embed_jitter=None,
                pos_embed_rescale=None,
            )
        )
        register()
        self.model.set_attn_implementation(NAME)  # one document an image: plain attention, as PE-lang's
        self.model.embeddings.mask_token.requires_grad_(False)  # for masked pre-training only; never used here

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.layer)

    def init_weights(self) -> None:
        self.model.apply(self.model._init_weights)

    def encode(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        height, width = (side // self.image_spec.patch_size for side in pixels.shape[-2:])
        output = self.model(pixel_values=pixels, output_hidden_states=bool(taps))

        def grid(tokens: Tensor) -> Tensor:
            return tokens[:, self.num_prefix :].unflatten(1, (height, width))  # [n,h,w,D]

        return grid(output.last_hidden_state), [grid(output.hidden_states[tap + 1]) for tap in taps]

    def tokens(self, pixels: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class tokens [n,D] and patches [n,L,D] of images of one size: what self-distillation learns from.

        pixels: [n,C,H,W], normalised.
        masked: [n,L] bool, True where the mask token stands for a patch; None: none.
        """
        if masked is None:
            side = self.image_spec.patch_size
            masked = torch.zeros(
                len(pixels), pixels.shape[2] // side * (pixels.shape[3] // side), dtype=torch.bool, device=pixels.device
            )
        output = self.model(pixel_values=pixels, bool_masked_pos=masked).last_hidden_state
        return output[:, 0], output[:, self.num_prefix :]
