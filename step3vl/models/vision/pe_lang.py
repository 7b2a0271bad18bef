"""PE-lang: Meta's language-aligned Perception Encoder, the vision tower of STEP3-VL (report: architecture).

A ViT with learned absolute positions, 2-D rotary positions, LayerScale and a first, but no last, LayerNorm; a class
token in the L/14 model alone. Parameter names are those of the released weights.

Shapes: n images of one size, C channels, H/W pixels, h/w grid cells, L = h*w patches (and the class token, where there
is one, before them), D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.models.attention import attend
from step3vl.models.vision.base import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, VisionEncoder, step_layout
from step3vl.types import ImageSpec, MultiCrop, Triple

ROPE_THETA = 10000.0


def rotary_angles(height: int, width: int, head_dim: int, device: torch.device, first: int = 0) -> Tensor:
    """Angles of a grid of patches in reading order: integer x (column) in the first half, y (row) in the second.

    Columns and rows are numbered from `first`.

    Returns:
        [height * width, head_dim / 2] float32, one angle for each pair of channels.
    """
    axis = head_dim // 2
    steps = torch.arange(0, axis, 2, device=device, dtype=torch.float32) / axis
    frequencies = ROPE_THETA**-steps  # [d/4]
    y, x = torch.meshgrid(
        torch.arange(first, first + height, device=device, dtype=torch.float32),
        torch.arange(first, first + width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.cat([x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies], dim=-1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (2k, 2k + 1) of x [n,L,...,d] by unit complex numbers [L,...,d/2], in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, hidden_size: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SelfAttention(nn.Module):
    """Attention of every patch to every patch, with fused query, key and value projections."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [n,L,3D]
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # [n,L,3,heads,d]
        turned, value = qkv.split((2, 1), dim=2)
        query, key = rotate(turned, turns).permute(2, 0, 3, 1, 4)  # each [n,heads,L,d]
        value = value.squeeze(2).transpose(1, 2)
        mixed = attend(query, key, value)  # [n,heads,L,d]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class QuickGELU(torch.autograd.Function):
    """x * sigmoid(1.702 x), which is silu(1.702 x) / 1.702. Keeps only x for backward, which is one kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(1.702 * x, inplace=True).div_(1.702)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)


class MLP(nn.Module):
    """Two linear maps with an activation between: exact GELU, or the sigmoid form x * sigmoid(1.702 x)."""

    def __init__(self, hidden_size: int, mlp_size: int, hidden_act: str) -> None:
        super().__init__()
        self.quick = hidden_act == "quick_gelu"
        self.c_fc = nn.Linear(hidden_size, mlp_size)
        self.c_proj = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(QuickGELU.apply(x) if self.quick else F.gelu(x))


class Block(nn.Module):
    """x += ls_1(attn(ln_1(x))); x += ls_2(mlp(ln_2(x)))."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, hidden_act: str, layer_scale: float) -> None:
        super().__init__()
        self.attn = SelfAttention(hidden_size, num_heads)
        self.ls_1 = LayerScale(hidden_size, layer_scale)
        self.ls_2 = LayerScale(hidden_size, layer_scale)
        self.ln_1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.ln_2 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = MLP(hidden_size, mlp_size, hidden_act)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), turns))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Holds the blocks under the name they have in the released weights."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


class PELang(VisionEncoder):
    """Perception Encoder, language-aligned. The defaults are the G/14 tower of STEP3-VL: 1,743,503,104 parameters.

    Args:
        hidden_size: width of the features.
        num_layers: number of blocks.
        num_heads: attention heads; hidden_size / num_heads must be a multiple of 4 (two axes of channel pairs).
        mlp_size: width inside the MLP.
        patch_size: side of a patch in pixels.
        grid_size: side of the learned position table in patches; another grid is interpolated from it.
        hidden_act: "quick_gelu" for STEP's weights, "gelu" (exact) for Meta's.
        layer_scale: initial LayerScale factor.
        use_class_token: Meta's L/14: a class token attends with the patches and is left out of the features. It takes
            row 0 of the position table and rotary position (0, 0); patches are then numbered from 1.
        mean: channel means that pixels are normalised with.
        std: channel deviations that pixels are normalised with.
        layout: how an image becomes views; None: STEP3-VL's cuts, 52 and 36 patches a side.
    """

    def __init__(
        self,
        hidden_size: int = 1536,
        num_layers: int = 47,
        num_heads: int = 16,
        mlp_size: int = 8960,
        patch_size: int = 14,
        grid_size: int = 52,
        hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu",
        layer_scale: float = 0.1,
        use_class_token: bool = False,
        mean: Triple = OPENAI_CLIP_MEAN,
        std: Triple = OPENAI_CLIP_STD,
        layout: MultiCrop | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size // num_heads % 4:
            raise ValueError(
                f"hidden_size {hidden_size} over num_heads {num_heads} must be a whole multiple of 4 channels a head"
            )
        if hidden_act not in ("gelu", "quick_gelu"):
            raise ValueError(f"hidden_act is {hidden_act!r}; accepted are 'gelu' and 'quick_gelu'")
        self.hidden_size = hidden_size
        self.head_dim = hidden_size // num_heads
        self.grid_size = grid_size
        self.num_prefix = int(use_class_token)
        self.image_spec = ImageSpec(patch_size, mean, std, layout or step_layout(patch_size))
        self.conv1 = nn.Conv2d(3, hidden_size, kernel_size=patch_size, stride=patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(self.num_prefix + grid_size * grid_size, hidden_size))
        self.class_embedding = nn.Parameter(torch.empty(hidden_size)) if use_class_token else None
        self.ln_pre = nn.LayerNorm(hidden_size, eps=1e-5)
        self.transformer = Transformer(
            [Block(hidden_size, num_heads, mlp_size, hidden_act, layer_scale) for _ in range(num_layers)]
        )
        self._turns: dict[tuple[int, int, torch.device], Tensor] = {}
        self._draw_tokens()

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.resblocks)

    def init_weights(self) -> None:
        for module in reversed(list(self.modules())):  # inner modules first: an outer one has the last word
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self._draw_tokens()
        self._turns.clear()

    def _draw_tokens(self) -> None:
        for weight in (self.positional_embedding, self.class_embedding):
            if weight is not None:
                nn.init.normal_(weight, std=self.hidden_size**-0.5)

    def encode(self, pixels: Tensor, taps: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        patches = self.conv1(pixels)  # [n,D,h,w]
        height, width = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2)  # [n,L,D]
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)  # [n,1+L,D]
        x = self.ln_pre(x + self.positions(height, width))
        turns = self.turns(height, width, x.device)
        kept: dict[int, Tensor] = {}

        def grid(x: Tensor) -> Tensor:
            return x[:, self.num_prefix :].unflatten(1, (height, width))  # [n,h,w,D]

        for number, block in enumerate(self.transformer.resblocks):
            x = block(x, turns)
            if number in taps:
                kept[number] = grid(x)
        return grid(x), [kept[tap] for tap in taps]

    def positions(self, height: int, width: int) -> Tensor:
        """The learned positions of a grid [L,D], bilinearly interpolated when it is not the native one."""
        if (height, width) == (self.grid_size, self.grid_size):
            return self.positional_embedding
        table = self.positional_embedding[self.num_prefix :].unflatten(0, (self.grid_size, self.grid_size))
        table = F.interpolate(table.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)
        return torch.cat([self.positional_embedding[: self.num_prefix], table[0].flatten(1).transpose(0, 1)])

    def turns(self, height: int, width: int, device: torch.device) -> Tensor:
        """The rotations of a grid as unit complex numbers [L,1,1,d/2], computed once for each grid and device."""
        key = (height, width, device)
        if key not in self._turns:
            with torch.inference_mode(False), torch.no_grad():  # may be kept from inference into training
                angles = rotary_angles(height, width, self.head_dim, device, first=self.num_prefix)
                angles = torch.cat([angles.new_zeros(self.num_prefix, angles.shape[1]), angles])
                self._turns[key] = torch.polar(torch.ones_like(angles), angles)[:, None, None]
        return self._turns[key]
