"""The strategy behind configs/strategy/fsdp2.yaml and hsdp.yaml: Lightning's, with copies of shards and number formats.

Lightning's ModelParallelStrategy knows one axis of shards and one of split tensors, gathers parameters as they are
kept, and by default takes every rank of a node for split tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from step3vl.parallel.shard import formats
from step3vl.saving import RunCheckpointIO, read_checkpoint
from step3vl.weights.runs import choose


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: each rank keeps a piece of every parameter; with `replicate_size` above 1, hybrid sharding (HSDP).

    The three sizes multiply to the number of ranks. With several copies, neighbouring ranks hold the pieces of one
    copy: gathering stays inside of a node when `data_parallel_size` is the number of its devices.

    Args:
        data_parallel_size: ranks that the pieces of one copy of the model are spread over.
        replicate_size: copies of the model, whose gradients are summed.
        tensor_parallel_size: ranks that split tensors; no part of the model does so yet, hence 1.
        gather_dtype: number format in which parameters travel and blocks compute, bfloat16 or float32; None: as they
            are kept, in fp32 (under bf16-mixed, matrix products are then in bf16 all the same).
        reduce_dtype: number format in which gradients are summed over ranks; None: that of the computation.
        save_distributed_checkpoint: of Lightning's own checkpoints, which are used where the callback
            step3vl.callbacks.Checkpoints is not: each rank writes its pieces, or rank 0 one file.
        timeout_s: seconds after which ranks that wait for another give up.
    """

    def __init__(
        self,
        data_parallel_size: int,
        replicate_size: int = 1,
        tensor_parallel_size: int = 1,
        gather_dtype: str | None = None,
        reduce_dtype: str | None = None,
        save_distributed_checkpoint: bool = True,
        timeout_s: float = 1800.0,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size * replicate_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(seconds=timeout_s),
        )
        self.num_pieces, self.num_copies, self.num_splits = data_parallel_size, replicate_size, tensor_parallel_size
        self.gather_dtype, self.reduce_dtype = gather_dtype, reduce_dtype

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """The number formats as FSDP2 takes them."""
        return formats(self.gather_dtype, self.reduce_dtype)

    def setup_environment(self) -> None:
        """Raises ValueError for an unknown format, or when the sizes do not multiply to the number of ranks."""
        formats(self.gather_dtype, self.reduce_dtype)
        num_ranks = self.num_nodes * self.num_processes
        sizes = (self.num_copies, self.num_pieces, self.num_splits)
        if num_ranks != self.num_copies * self.num_pieces * self.num_splits:
            raise ValueError(
                f"trainer.strategy: replicate_size x data_parallel_size x tensor_parallel_size is "
                f"{' x '.join(map(str, sizes))}, but there are {num_ranks} ranks (num_nodes x devices); "
                f"set --trainer.strategy.data_parallel_size={max(1, num_ranks // (self.num_copies * self.num_splits))}"
            )
        super().setup_environment()
        if self.num_copies > 1:
            names = ("replicate", "data_parallel", "tensor_parallel")
            self._device_mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the data is this rank's: copies differ in it as pieces do."""
        return {"num_replicas": self.num_copies * self.num_pieces, "rank": self.global_rank // self.num_splits}

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def writer(self) -> Any:
        """What saves checkpoints of ours; None where Lightning's are wanted."""
        return self.checkpoint_io.writer if isinstance(self.checkpoint_io, RunCheckpointIO) else None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return self.writer is not None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.writer is None:
            return super().lightning_module_state_dict()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()  # shards, not copied yet

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return super().optimizer_state(optimizer) if self.writer is None else optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.writer is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            self.writer.save(checkpoint, Path(self.broadcast(filepath)), all_ranks=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of ours from any number of ranks, each rank its own rows; others as Lightning does."""
        path = Path(self.broadcast(checkpoint_path))
        if self.writer is None or not path.is_dir() or (path / ".metadata").is_file():
            return super().load_checkpoint(path, weights_only)
        assert self.lightning_module is not None
        parameters = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]
        chosen = choose(path, print if self.is_global_zero else _say_nothing)
        return read_checkpoint(chosen, self.lightning_module.state_dict(), parameters)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if checkpoint.get("state_dict"):  # ours; Lightning's loading has filled the model already
            Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if checkpoint.get("optimizer_states"):
            Strategy.load_optimizer_state_dict(self, checkpoint)


def _say_nothing(text: str) -> None:
    """What ranks but the first say."""
