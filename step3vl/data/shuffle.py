"""Shuffles that can be asked for one element at a time.

The i-th element of a shuffle of n is computed, not stored: no array of n indices, nothing to save on resume, and the
same on every machine and library version, for it is integer arithmetic alone.
"""

from __future__ import annotations

MASK = 2**64 - 1
ROUNDS = 6


def mix(*values: int) -> int:
    """A 64-bit number that depends on all values and looks random (SplitMix64 over the values in turn)."""
    state = 0
    for value in values:
        state = ((state ^ (value & MASK)) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def shuffled(i: int, n: int, key: int) -> int:
    """Element i of the shuffle of range(n) that belongs to `key`. Raises ValueError unless 0 <= i < n.

    A Feistel network permutes the next power of four; what falls outside range(n) is permuted again until it is inside.
    """
    if not 0 <= i < n:
        raise ValueError(f"element {i} of a shuffle of {n} does not exist")
    half = max(((n - 1).bit_length() + 1) // 2, 1)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(key, turn, right) & low)
        i = left << half | right
        if i < n:
            return i
