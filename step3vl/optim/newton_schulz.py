"""A nearly orthogonal matrix, fast: what Muon turns a momentum into."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the Muon reference


def orthogonalise(matrices: Tensor, num_steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[m,R,C] -> [m,R,C] with singular values near 1, by Newton-Schulz in `dtype`. A zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).float()
