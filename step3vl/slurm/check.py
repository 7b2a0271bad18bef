"""A job's nodes and GPUs against the run's own numbers, before anybody waits in a queue."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from step3vl.config import ConfigError

from .request import Request


def check_sizes(config: Mapping[str, Any], request: Request, where: str = "the run") -> None:
    """Nodes and GPUs of a job agree with trainer.num_nodes, trainer.devices and the sizes of the strategy.

    Raises:
        ConfigError: one sentence with each key, both numbers, and the overrides that make them equal.
    """
    trainer = dict(config.get("trainer") or {})
    if request.gpus and trainer.get("accelerator") == "cpu":
        raise ConfigError(f"--gpus is {request.gpus}, but trainer.accelerator of {where} is cpu: give --gpus 0")
    found: list[str] = []
    fixes: list[str] = []
    nodes = trainer.get("num_nodes") or 1
    if nodes != request.nodes:
        found.append(f"trainer.num_nodes is {nodes}, not {request.nodes}")
        fixes.append(f"--trainer.num_nodes={request.nodes}")
    devices = num_devices(trainer.get("devices", "auto"))
    if devices not in (None, request.tasks_per_node):
        found.append(f"trainer.devices is {devices}, not {request.tasks_per_node}")
        fixes.append(f"--trainer.devices={request.tasks_per_node}")
    sizes = strategy_sizes(trainer.get("strategy"), request)
    if sizes and math.prod(sizes.values()) != request.num_tasks:
        named = " x ".join(f"trainer.strategy.{name}" for name in sizes)
        numbers = " x ".join(str(size) for size in sizes.values())
        total = f" = {math.prod(sizes.values())}" if len(sizes) > 1 else ""
        found.append(f"{named} is {numbers}{total}, not {request.num_tasks}")
        fixes += _fit(sizes, request)
    if found:
        raise ConfigError(
            f"a job of --nodes {request.nodes} x --gpus {request.gpus} does not fit {where}: {'; '.join(found)}; "
            f"add {' '.join(fixes)}"
        )


def num_devices(given: Any) -> int | None:
    """Processes of a node that `trainer.devices` means; None: as many as there are."""
    if given in ("auto", -1, "-1", None):
        return None
    if isinstance(given, list):
        return len(given)
    if isinstance(given, str):
        return len([part for part in given.split(",") if part]) if "," in given else int(given)
    return int(given)


def strategy_sizes(strategy: Any, request: Request) -> dict[str, int]:
    """The strategy's sizes that multiply to the number of ranks, by argument; {} for a strategy without."""
    if not isinstance(strategy, Mapping):
        return {}
    arguments = strategy.get("init_args") or {}
    if isinstance(arguments.get("device_mesh"), list | tuple):  # FSDPStrategy: [replicas, shards]
        return {f"device_mesh.{i}": int(size) for i, size in enumerate(arguments["device_mesh"])}
    auto = {"data_parallel_size": request.nodes, "tensor_parallel_size": request.tasks_per_node}  # Lightning's meaning
    sizes = {}
    for name, size in arguments.items():
        if name.endswith("parallel_size") or name == "replicate_size":
            sizes[name] = auto.get(name, 1) if size in ("auto", None) else int(size)
    if str(strategy.get("class_path", "")).rpartition(".")[2] == "ModelParallelStrategy":
        sizes = {name: sizes.get(name, default) for name, default in auto.items()} | sizes
    return sizes


def _fit(sizes: Mapping[str, int], request: Request) -> list[str]:
    """Overrides that keep all sizes but the pieces', if what is left divides the number of ranks."""
    if next(iter(sizes)).startswith("device_mesh"):
        return [f"--trainer.strategy.device_mesh=[{request.nodes},{request.tasks_per_node}]"]
    first = "data_parallel_size" if "data_parallel_size" in sizes else next(iter(sizes))
    others = [name for name in sizes if name != first]
    rest = math.prod(sizes[name] for name in others)
    if request.num_tasks % rest:
        ones = [f"--trainer.strategy.{name}=1" for name in others]
        return [f"--trainer.strategy.{first}={request.num_tasks}", *ones]
    return [f"--trainer.strategy.{first}={request.num_tasks // rest}"]
