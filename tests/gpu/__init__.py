"""Checks that need a GPU: run them with `pytest -m gpu`. Without a CUDA device each is skipped, with the reason."""

import pytest
import torch

DEVICE = torch.device("cuda")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]
"""What every file of this folder marks its tests with."""


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`, on the CPU in fp64. NaN is infinitely far."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    away = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return away if away == away else float("inf")
