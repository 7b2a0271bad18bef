"""Which number format this machine is fast at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86 (two) and Arm
CPUINFO = Path("/proc/cpuinfo")


def fast_precision(accelerator: Any, cpuinfo: Path = CPUINFO) -> str:
    """Lightning's name of the format: bf16-mixed on GPUs and CPUs with bf16 instructions, else 32-true.

    Decided by what the processor says of itself, not by a timing, so that the same machine always answers the same.
    """
    if torch.cuda.is_available() and accelerator != "cpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return "bf16-mixed" if words.intersection(BF16_FLAGS) else "32-true"
