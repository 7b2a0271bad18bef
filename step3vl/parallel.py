"""Sharding with FSDP2: every block is a unit, the rest of the model is the root unit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard parameters over `mesh` in place, one gather a block, in forward order."""
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
