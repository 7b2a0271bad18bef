"""Ranks that hold pieces of one model must run its forwards together, or they wait for one another for ever."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


class Ranks:
    """The ranks that share a module's parameters; a rank that holds them all is alone.

    All ranks must generate equally often, though one may have no prompt at all.
    """

    def __init__(self, module: nn.Module):
        self.group: ProcessGroup | None = None
        self.is_sharded = False
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                self.is_sharded, self.device = True, parameter.device
                axes = [axis for axis, placement in enumerate(parameter.placements) if placement.is_shard()]
                if axes and parameter.device_mesh.size(axes[0]) > 1:
                    self.group = parameter.device_mesh.get_group(axes[0])
                return

    @property
    def is_alone(self) -> bool:
        return self.group is None

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over the ranks."""
        if self.group is None:
            return numbers
        found = torch.tensor(numbers, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self.group)
        return tuple(found.tolist())
