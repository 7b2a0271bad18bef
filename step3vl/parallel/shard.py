"""Sharding with FSDP2: every block is a unit, the rest of the model is the root unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shard(
    module: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None
) -> None:
    """Shard parameters over `mesh` in place, one gather a block, in forward order.

    Args:
        module: on the device of the mesh or on the meta device.
        blocks: parts of `module` that are units of their own.
        mesh: one axis, the ranks that hold a piece each; or two, whole copies x pieces (hybrid sharding).
        policy: from `formats`; None: parameters are gathered, and gradients summed, in the parameters' own format.
    """
    policy = policy or MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes of a strategy's mesh over which the model is sharded, and, in front of them, copied.

    Raises:
        ValueError: the mesh splits tensors, which no part of the model does.
    """
    names = mesh.mesh_dim_names or ()
    num_splits = mesh["tensor_parallel"].size() if "tensor_parallel" in names else 1
    if num_splits > 1:
        raise ValueError(
            f"trainer.strategy.tensor_parallel_size is {num_splits}; accepted is 1, because no part of the model "
            "splits its tensors: give all ranks to data_parallel_size"
        )
    return mesh["replicate", "data_parallel"] if "replicate" in names else mesh["data_parallel"]


def formats(gather_dtype: str | None = None, reduce_dtype: str | None = None) -> MixedPrecisionPolicy:
    """In which number format parameters are gathered and computed with, and in which gradients are summed over ranks.

    The pieces that a rank keeps, its gradients and its optimizer state stay in the parameters' own format.

    Raises:
        ValueError: a name is not one of `DTYPES`.
    """
    for key, name in (("gather_dtype", gather_dtype), ("reduce_dtype", reduce_dtype)):
        if name is not None and name not in DTYPES:
            raise ValueError(
                f"trainer.strategy.{key} is {name!r}; accepted are {', '.join(map(repr, DTYPES))} and null"
            )
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[gather_dtype] if gather_dtype else None,
        reduce_dtype=DTYPES[reduce_dtype] if reduce_dtype else None,
    )
