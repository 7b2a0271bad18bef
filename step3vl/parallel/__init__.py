"""The model over several ranks: sharding, weights drawn a block at a time, recomputation, and strategies for cards.

`shard` cuts a model into FSDP2 units, `Blueprint` fills one that was built without memory, `recompute` trades time for
memory. The strategies import Lightning and are therefore loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from step3vl.parallel.blueprint import Blueprint, Drawable, has_no_memory
from step3vl.parallel.recompute import recompute
from step3vl.parallel.shard import data_mesh, formats, shard

if TYPE_CHECKING:
    from step3vl.parallel.strategy import ShardedStrategy

__all__ = ["Blueprint", "Drawable", "ShardedStrategy", "data_mesh", "formats", "has_no_memory", "recompute", "shard"]


def __getattr__(name: str) -> Any:
    if name != "ShardedStrategy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    from step3vl.parallel.strategy import ShardedStrategy

    return ShardedStrategy
