"""The model and the optimizer of a run by their shapes alone: everything is built on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.optim import Optimizer

from step3vl.diagnose import check_classes, import_class
from step3vl.models import VisionLanguageModel
from step3vl.optim import ParamGroup, build_groups


def build_vlm(card: Mapping[str, Any]) -> VisionLanguageModel:
    """The model of a composed `model.vlm`, without memory for its weights. Raises ValueError for a bad argument."""
    check_classes(card, "model.vlm")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_argument("--vlm", type=VisionLanguageModel)
        return parser.instantiate_classes(parser.parse_object({"vlm": dict(card)})).vlm


def build_optimizer(vlm: VisionLanguageModel, arguments: Mapping[str, Any]) -> Optimizer:
    """The optimizer that a stage with these arguments would use, over the trained parameters of `vlm`."""
    card = arguments["optimizer"]
    groups = [ParamGroup(**dict(group)) for group in arguments.get("param_groups") or []]
    return import_class(card["class_path"], "model.optimizer")(
        build_groups(vlm, groups), **(card.get("init_args") or {})
    )


def optimizer_state(vlm: nn.Module, optimizer: Optimizer) -> dict[nn.Parameter, int]:
    """Bytes of state that an optimizer keeps for each parameter, learnt from one step that it takes on shapes."""
    parameters = list(vlm.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return {p: sum(size(value) for value in optimizer.state.get(p, {}).values()) for p in parameters}


def size(value: Any) -> int:
    """Bytes of a tensor of state; counters and other scalars count nothing."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) and value.ndim else 0
