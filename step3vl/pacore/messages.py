"""From trajectories to messages: what each concludes, in an order that does not depend on which came first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

THOUGHTS_END = "</think>"
SHUFFLE_SEED = 42
"""Of the published code."""


class Said(Protocol):
    """What is needed of a completion."""

    text: str
    error: str | None


def compact(text: str) -> str:
    """What follows the last closing think tag, untrimmed; the whole text where there is none."""
    return text.rpartition(THOUGHTS_END)[2]


def passed_on(completions: Sequence[Said], shuffle_seed: int = SHUFFLE_SEED) -> list[int]:
    """Which completions are passed to the next round, as places in `completions`, in the order they are passed in.

    Sorted by length, texts of equal length by their characters, then shuffled with a fixed seed, as published. Those
    that failed take part in the shuffle as empty texts; what has no message, nothing but space, is left out after it.
    """
    texts = ["" if completion.error is not None else completion.text for completion in completions]
    order = sorted(range(len(texts)), key=lambda k: (len(texts[k]), texts[k]))
    random.Random(shuffle_seed).shuffle(order)
    return [k for k in order if compact(texts[k]).strip()]
