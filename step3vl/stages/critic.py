"""How PPO's critic is trained beside the policy: its model, optimizer, loss and warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from step3vl.losses.value import ClippedValue
from step3vl.models import ValueModel
from step3vl.optim import ParamGroup


@dataclass(kw_only=True)
class Critic:
    """A critic of its own, which shares no weight with the policy (Open-Reasoner-Zero)."""

    model: ValueModel
    optimizer: Callable[[Any], Optimizer]
    """Class or card that takes groups of (name, parameter)."""
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    """Class or card that takes the optimizer and gives one multiplier a step of the critic."""
    param_groups: Sequence[ParamGroup] = ()
    loss: ClippedValue = field(default_factory=ClippedValue)
    num_minibatches: int = 1
    """Optimizer steps an iteration, each on another part of the rollouts."""
    warmup_iterations: int = 0
    """First iterations, in which the critic learns and the policy stays as it is; they do not count as steps."""
    init_from: str | None = None
    """Where the body's weights come from: a run or any other checkpoint; None: the policy's first weights."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.num_minibatches < 1 or self.warmup_iterations < 0 or self.max_grad_norm <= 0:
            raise ValueError(
                "model.critic needs num_minibatches >= 1, warmup_iterations >= 0 and max_grad_norm > 0, got "
                f"{self.num_minibatches}, {self.warmup_iterations} and {self.max_grad_norm}"
            )


def copy_weights(source: nn.Module, target: nn.Module, but: str = "") -> None:
    """Copy parameters and buffers by name, sharded or not.

    Args:
        source, target: with the same names and shapes, but for `but`.
        but: beginning of names that are left as they are; empty: none.

    Raises:
        ValueError: a name or a shape differs.
    """
    given, wanted = source.state_dict(keep_vars=True), target.state_dict(keep_vars=True)
    names = [name for name in wanted if not (but and name.startswith(but))]
    odd = [name for name in names if name not in given or given[name].shape != wanted[name].shape]
    if odd:
        raise ValueError(
            f"model.critic.model differs from the policy in {len(odd)} tensors ({odd[0]}, ...); give "
            "model.critic.init_from, a checkpoint that fits it"
        )
    with torch.no_grad():
        for name in names:
            wanted[name].copy_(given[name])
