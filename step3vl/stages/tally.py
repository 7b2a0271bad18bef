"""What an iteration of reinforcement learning counts: weighted means, maxima and counts, over packs and ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step3vl.types import WeightedSum


class Tally:
    """Gathers scalars by name until `total` adds them over ranks; ranks may know different names."""

    def __init__(self) -> None:
        self.means: defaultdict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0])
        self.maxima: dict[str, Any] = {}
        self.counts: defaultdict[str, float] = defaultdict(float)

    def mean(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add a sum and its weight to a mean. Tensors are not waited for."""
        held = self.means[name]
        held[0], held[1] = held[0] + value, held[1] + weight

    def means_of(self, sums: Mapping[str, WeightedSum]) -> None:
        for name, (value, weight) in sums.items():
            self.mean(name, value.detach(), weight)

    def maximum(self, name: str, value: Tensor | float) -> None:
        held = self.maxima.get(name)
        if held is None or bool(value > held):
            self.maxima[name] = value

    def count(self, name: str, number: float = 1.0) -> None:
        self.counts[name] += number

    def total(self) -> dict[str, float]:
        """Means, maxima and counts over all ranks, by name; then everything begins anew. All ranks call it."""
        own = {
            "means": {name: [float(x) for x in pair] for name, pair in self.means.items()},
            "maxima": {name: float(x) for name, x in self.maxima.items()},
            "counts": dict(self.counts),
        }
        everyone = gather(own)
        found: dict[str, float] = {}
        for name in _names(everyone, "means"):
            pairs = [one["means"].get(name, (0.0, 0.0)) for one in everyone]
            value, weight = (sum(column) for column in zip(*pairs))
            if weight:
                found[name] = value / weight
        for name in _names(everyone, "maxima"):
            found[name] = max(one["maxima"].get(name, -float("inf")) for one in everyone)
        for name in _names(everyone, "counts"):
            found[name] = sum(one["counts"].get(name, 0.0) for one in everyone)
        for held in (self.means, self.maxima, self.counts):
            held.clear()
        return found


def gather(item: Any) -> list[Any]:
    """An object of every rank, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def _names(everyone: list[dict[str, dict]], kind: str) -> list[str]:
    return list(dict.fromkeys(name for one in everyone for name in one[kind]))
