"""How fast a device multiplies matrices at best: what utilisation is measured against."""

from __future__ import annotations

import time

import torch

PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bf16 FLOP/s by device name, from the makers' data sheets (SXM)."""
SIDE = 1024


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s and where the figure comes from: a data sheet, or for other devices a measurement that takes 0.2 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name and dtype in (torch.bfloat16, torch.float16):
                return peak, f"{part} data sheet, dense {str(dtype).removeprefix('torch.')}"
    return measured_flops(
        device, dtype
    ), f"measured with {SIDE} x {SIDE} matrices in {str(dtype).removeprefix('torch.')}"


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of repeated products of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    a @ b  # the first one prepares kernels
    best, end, num = float("inf"), time.perf_counter() + seconds, 0
    while num < 3 or time.perf_counter() < end:
        num += 1
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best
