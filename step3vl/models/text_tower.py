"""A small transformer that turns a caption into one vector: the other side of contrastive training (PE, SigLIP 2).

Pre-norm blocks with learned positions; causal with the last token (CLIP, PE) or both ways (SigLIP). It is thrown away
once the vision encoder has learnt.

Shapes: n captions, T tokens, D width, E width of the embedding, H heads, d width of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.models.flops import matrix_size

INIT_STD = 0.02


class TextBlock(nn.Module):
    """x += attn(norm_1(x)); x += mlp(norm_2(x))."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.c_fc, self.c_proj = nn.Linear(hidden_size, mlp_size), nn.Linear(mlp_size, hidden_size)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """x [n,T,D]; allowed [n,1,T,T] bool, True where a token may look."""
        qkv = F.linear(self.norm_1(x), self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [n,H,T,d]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        x = x + self.out_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.c_proj(F.gelu(self.c_fc(self.norm_2(x))))


class TextTower(nn.Module):
    """Token ids to embeddings of captions.

    Args:
        hidden_size: width inside.
        num_layers: number of blocks.
        num_heads: attention heads.
        vocab_size: number of token ids.
        max_tokens: longest caption; the data cut longer ones.
        out_size: width of the embedding; the image side is brought to the same.
        is_causal: a token sees those before it alone.
        pooling: last: the last token of a caption; mean: the mean over its tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        vocab_size: int,
        max_tokens: int,
        out_size: int,
        is_causal: bool = True,
        pooling: Literal["last", "mean"] = "last",
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"text_tower: hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if pooling not in ("last", "mean"):
            raise ValueError(f"text_tower: pooling is {pooling!r}; accepted are last and mean")
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.max_tokens, self.out_size = max_tokens, out_size
        self.is_causal, self.pooling = is_causal, pooling
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.positional_embedding = nn.Parameter(torch.empty(max_tokens, hidden_size))
        self.layers = nn.ModuleList(TextBlock(hidden_size, num_heads, 4 * hidden_size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.proj = nn.Linear(hidden_size, out_size, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.positional_embedding, std=INIT_STD / 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [n,T] long and mask [n,T], True at a caption's tokens, which come first -> embeddings [n,E].

        Raises ValueError for captions longer than `max_tokens`.
        """
        length = ids.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"a caption of {length} tokens is longer than text_tower.max_tokens, {self.max_tokens}")
        allowed = mask[:, None, None, :].expand(-1, 1, length, -1)  # [n,1,T,T]
        if self.is_causal:
            allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        x = self.token_embedding(ids) + self.positional_embedding[:length]  # [n,T,D]
        for layer in self.layers:
            x = layer(x, allowed)
        x = self.norm(x)
        if self.pooling == "last":
            pooled = x[torch.arange(len(x), device=x.device), mask.sum(1) - 1]  # [n,D]
        else:
            pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.proj(pooled)

    def flops(self, num_tokens: int) -> float:
        """FLOPs of the forward of one caption of so many tokens."""
        attention = 4.0 * len(self.layers) * num_tokens**2 * self.hidden_size
        return 2.0 * num_tokens * matrix_size(self.layers) + attention + 2.0 * self.proj.weight.numel()
