"""The head of self-distillation: features to logits over prototypes (DINO, iBOT). Thrown away after pre-training."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.models.flops import matrix_size


class PrototypeHead(nn.Module):
    """An MLP with GELUs down to a bottleneck, then cosines with prototypes (a linear map with unit rows).

    Args:
        in_size: width of the features.
        hidden_size: width inside the MLP.
        bottleneck_size: width of what prototypes are compared with.
        num_prototypes: K.
        num_layers: linear maps of the MLP.
    """

    def __init__(
        self, in_size: int, hidden_size: int, bottleneck_size: int, num_prototypes: int, num_layers: int = 3
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"a prototype head needs num_layers of at least 1, got {num_layers}")
        widths = [in_size, *[hidden_size] * (num_layers - 1), bottleneck_size]
        layers: list[nn.Module] = []
        for first, second in pairwise(widths):
            layers += [nn.Linear(first, second), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototype_embedding = nn.Parameter(torch.empty(num_prototypes, bottleneck_size))
        nn.init.trunc_normal_(self.prototype_embedding, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """[...,D] -> logits [...,K] between -1 and 1."""
        x = F.normalize(self.mlp(features).float(), dim=-1, eps=1e-6)
        return F.linear(x, F.normalize(self.prototype_embedding.float(), dim=-1, eps=1e-6))

    def flops(self) -> float:
        """FLOPs of the forward of one feature."""
        return 2.0 * matrix_size([self])
