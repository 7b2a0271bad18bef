"""Random numbers that belong to a token's place: a hash of seed, call, prompt, sample and step.

So a completion depends on no other sequence, on no batch size, and on no order in which sequences come and go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from step3vl.data.shuffle import mix

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, call: int, prompt: int, sample: int) -> int:
    """The name, 64 bits, of the numbers of one sequence."""
    return mix(seed, call, prompt, sample)


def uniforms(keys: Sequence[int], steps: Sequence[int]) -> Tensor:
    """One number [R] float64 from [0, 1) for each row: number `steps[r]` of the stream `keys[r]` (SplitMix64)."""
    x = np.asarray(keys, dtype=np.uint64) + (np.asarray(steps, dtype=np.uint64) + np.uint64(1)) * GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)
