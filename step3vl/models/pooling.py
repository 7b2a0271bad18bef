"""From a grid of features to one vector: what contrastive training compares with a caption.

Shapes: n images, h/w grid cells, D width, E width of the embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.models.attention import attend


class MeanPool(nn.Module):
    """The mean over the grid, a LayerNorm, a linear map."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.proj = nn.Linear(hidden_size, out_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[n,h,w,D] -> [n,E]."""
        return self.proj(self.norm(features.flatten(1, 2).mean(1)))

    def flops(self, num_patches: int) -> float:
        return 2.0 * self.proj.weight.numel()


class AttentionPool(nn.Module):
    """Learnt queries attend to the grid; an MLP and a linear map follow (the attention-pool heads of PE and SigLIP).

    Args:
        hidden_size: width of the features.
        out_size: width of the embedding.
        num_heads: attention heads.
        num_queries: learnt queries; the published heads have one. The linear map takes all of them side by side.
        mlp_size: width inside the MLP; None: four times hidden_size.
    """

    def __init__(
        self, hidden_size: int, out_size: int, num_heads: int = 8, num_queries: int = 1, mlp_size: int | None = None
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.query_token = nn.Parameter(torch.randn(num_queries, hidden_size) * hidden_size**-0.5)
        self.norm_in = nn.LayerNorm(hidden_size)
        self.query, self.key_value = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        mlp_size = mlp_size or 4 * hidden_size
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Linear(mlp_size, hidden_size))
        self.proj = nn.Linear(num_queries * hidden_size, out_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[n,h,w,D] -> [n,E]."""
        x = self.norm_in(features.flatten(1, 2))  # [n,L,D]
        key, value = self.key_value(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n,H,L,d]
        query = self.query(self.query_token).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # [H,Q,d]
        query = query.to(value.dtype).expand(len(x), *query.shape)  # [n,H,Q,d]
        pooled = self.out(attend(query, key.to(value.dtype), value).transpose(1, 2).flatten(2))  # [n,Q,D]
        pooled = pooled + self.mlp(self.norm(pooled))
        return self.proj(pooled.flatten(1))

    def flops(self, num_patches: int) -> float:
        """Of one image of so many patches."""
        mlp = sum(layer.weight.numel() for layer in self.mlp if isinstance(layer, nn.Linear))
        num_queries, width = self.query_token.shape
        own = self.query.weight.numel() + self.out.weight.numel() + mlp
        attention = 4.0 * num_queries * num_patches * width
        return 2.0 * (num_patches * self.key_value.weight.numel() + num_queries * own + self.proj.weight.numel()) + (
            attention
        )


def pooled_cells(features: Tensor, num_cells: int) -> Tensor:
    """[n,h,w,D] -> [n,c,c,D]: means over c x c equal parts of the grid, c being `num_cells`."""
    return F.adaptive_avg_pool2d(features.float().permute(0, 3, 1, 2), num_cells).permute(0, 2, 3, 1)
