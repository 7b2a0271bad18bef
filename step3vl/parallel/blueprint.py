"""Weights for a model that was built without memory, on the meta device.

Fresh weights are drawn unit by unit (a block, or a module outside of the blocks) in main memory, each unit from a seed
made of the run's seed and the unit's name. They are therefore the same on any device and any number of ranks, and at
no time does a process hold more than what it keeps and one unit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


class Drawable(Protocol):
    """A module whose `init_weights` draws all weights and recomputes all buffers; it must also run without memory."""

    def init_weights(self) -> None: ...


def has_no_memory(module: nn.Module) -> bool:
    """Whether some parameter or buffer is on the meta device."""
    return any(tensor.is_meta for _, tensor in state(module))


class Blueprint:
    """A copy of a model without memory, from which one unit after the other is drawn.

    Args:
        model: on the meta device, before it is sharded.
        blocks: parts of it that are drawn as one unit each; every other module with weights of its own is a unit.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model = copy.deepcopy(model)
        numbers = {id(block) for block in blocks}
        prefixes = {name for name, module in model.named_modules() if id(module) in numbers}
        self.units: dict[str, list[str]] = {}
        """Names of parameters and buffers by the name of their unit, in the model's order."""
        for name, _ in state(model):
            owner = name.rpartition(".")[0]
            self.units.setdefault(next(_ancestors(owner, prefixes), owner), []).append(name)

    def fill(self, model: nn.Module, device: torch.device | str, seed: int) -> None:
        """Give the model, sharded or whole, memory on `device` and fresh weights; a shard takes its own rows.

        Raises:
            ValueError: `init_weights` leaves a parameter or buffer without values, or one is sharded over another axis
                than its first.
        """
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        model.to_empty(device=device)
        for first, *others in tied.values():
            for other in others:  # to_empty parts them
                path, _, leaf = other.rpartition(".")
                setattr(model.get_submodule(path), leaf, model.get_parameter(first))
        targets = dict(state(model))
        for unit, names in self.units.items():
            values = self.draw(unit, seed)
            for name in names:
                _take(targets[name], values.pop(name), name)

    def draw(self, unit: str, seed: int) -> dict[str, Tensor]:
        """Fresh values of a unit's parameters and buffers, whole and in main memory, by their names in the model."""
        here = {name: self._place(name) for name in self.units[unit]}
        versions = {name: tensor._version for name, tensor in here.items()}

        def is_empty(name: str, value: Tensor) -> bool:
            if value.is_floating_point():
                return value.is_meta or bool(value.sum().isnan())
            return value.is_meta or (value is here[name] and value._version == versions[name])

        try:
            with torch.no_grad(), seeded(f"{seed}/{unit}"):
                self.model.init_weights()  # type: ignore[operator]  # what lies outside of the unit is still meta
            values = {name: self._get(name) for name in here}
            empty = [name for name, value in values.items() if is_empty(name, value)]
            if empty:
                raise ValueError(
                    f"{type(self.model).__name__}.init_weights leaves {', '.join(empty[:5])} without values; it must "
                    "draw every parameter and compute every buffer afresh"
                )
            return {name: value.detach() for name, value in values.items()}
        finally:
            for name in here:
                self._set(name, self._get(name).to("meta"))

    def _place(self, name: str) -> Tensor:
        """Main memory for one tensor of the copy, with nothing in it that could pass for a value."""
        tensor = torch.empty_like(self._get(name), device="cpu")
        self._set(name, tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor)
        return self._get(name)

    def _get(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor.detach(), requires_grad=False)


def state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer, with those that are not saved; a tied one comes once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """Random numbers in main memory follow from `text` inside, and go on as if nothing had been drawn afterwards."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _ancestors(owner: str, prefixes: set[str]) -> Iterator[str]:
    parts = owner.split(".")
    return (name for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)) if name in prefixes)


@torch.no_grad()
def _take(target: Tensor, value: Tensor, name: str) -> None:
    """Copy a whole tensor into `target`; a shard takes only its own rows."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement not in (Replicate(), Shard(0)) for placement in target.placements):
        raise ValueError(f"{name}: placement {target.placements} cannot be filled; only the first axis may be sharded")
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    rows = value[offset[0] : offset[0] + shape[0]] if shape else value
    if rows.numel():
        target.to_local().copy_(rows)
