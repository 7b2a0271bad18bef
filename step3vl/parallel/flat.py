"""Lightning's FSDPStrategy (the older FSDP, GPUs only): what it must be told, and what it changes about parameters.

It flattens the parameters of a block into one, so that shapes are gone once the model is wrapped, and it gives a model
without memory its weights by a function that is called for one module at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from step3vl.parallel.blueprint import Blueprint

if TYPE_CHECKING:
    from lightning.pytorch.strategies import FSDPStrategy

WRAPPER = "_fsdp_wrapped_module."


def tell(
    strategy: FSDPStrategy, module: nn.Module, blocks: Sequence[nn.Module], blueprint: Blueprint | None, seed: int
) -> None:
    """Before the strategy wraps the model: the blocks are its units, and weights come from the blueprint."""
    from torch.distributed.fsdp.wrap import CustomPolicy

    numbers = {id(block) for block in blocks}
    strategy.kwargs["auto_wrap_policy"] = CustomPolicy(lambda part: id(part) in numbers)
    strategy.kwargs["use_orig_params"] = True
    if blueprint is not None:
        strategy.kwargs["param_init_fn"] = initialiser(module, blueprint, strategy.root_device, seed)


def initialiser(
    module: nn.Module, blueprint: Blueprint, device: torch.device | str, seed: int
) -> Callable[[nn.Module], None]:
    """A function that gives one submodule, without its children, memory on `device` and fresh weights.

    Called block by block, as wrapping goes, it holds one unit at a time.
    """
    paths = {id(part): path for path, part in module.named_modules()}
    unit_of = {name: unit for unit, names in blueprint.units.items() for name in names}
    drawn: dict[str, dict[str, Tensor]] = {}

    def fill(part: nn.Module) -> None:
        path = paths.get(id(part))
        own: list[dict[str, Any]] = [part._parameters, part._buffers]  # type: ignore[list-item]
        for tensors in own:
            for leaf, tensor in tensors.items():
                name = f"{path}.{leaf}" if path else leaf
                if tensor is None or not tensor.is_meta or path is None or name not in unit_of:
                    continue
                unit = unit_of[name]
                if unit not in drawn:
                    drawn.clear()
                    drawn[unit] = blueprint.draw(unit, seed)
                value = drawn[unit][name].to(device)
                tensors[leaf] = nn.Parameter(value, tensor.requires_grad) if tensors is part._parameters else value

    return fill


def renewed(groups: Sequence[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Groups of (name, parameter) that were made before wrapping, with the parameters that the module has now."""
    now = {name.replace(WRAPPER, ""): parameter for name, parameter in module.named_parameters()}
    return [{**group, "params": [(name, now[name]) for name, _ in group["params"]]} for group in groups]
