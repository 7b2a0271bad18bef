"""Parameter groups by name pattern. A pattern that matches nothing is an error, because it would freeze nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(kw_only=True)
class ParamGroup:
    """Parameters whose name matches `pattern` (a regular expression, searched) take these instead of the defaults."""

    pattern: str
    lr: float | None = None
    """Learning rate of this group; None: the optimizer's."""
    weight_decay: float | None = None
    """Weight decay of this group; None: the optimizer's."""


def freeze_parameters(module: nn.Module, patterns: Sequence[str]) -> None:
    """Switch off gradients of every parameter whose name matches one of `patterns`."""
    for pattern in patterns:
        for name in _matching(module, pattern, "freeze"):
            module.get_parameter(name).requires_grad_(False)


def build_groups(module: nn.Module, groups: Sequence[ParamGroup] = ()) -> list[dict]:
    """Trainable parameters as torch groups of (name, parameter); first matching pattern wins, the rest is `default`.

    Parameters with fewer than two axes (norms, biases, LayerScale) form groups of their own without weight decay, as
    AdamW recipes for transformers do, unless their ParamGroup sets one.
    """
    for group in groups:
        _matching(module, group.pattern, "param_groups")
    buckets: dict[tuple[str, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = next((g for g in groups if re.search(g.pattern, name)), None)
        label, is_vector = owner.pattern if owner else "default", parameter.ndim < 2
        bucket = buckets.setdefault((label, is_vector), {"name": label + (" (1-D)" if is_vector else ""), "params": []})
        bucket["params"].append((name, parameter))
        if is_vector:
            bucket["weight_decay"] = 0.0
        if owner and owner.lr is not None:
            bucket["lr"] = owner.lr
        if owner and owner.weight_decay is not None:
            bucket["weight_decay"] = owner.weight_decay
    if not buckets:
        raise ValueError("nothing to train: every parameter is frozen")
    return list(buckets.values())


def _matching(module: nn.Module, pattern: str, key: str) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        tops = sorted({".".join(name.split(".")[:2]) for name in names})
        raise ValueError(f"{key}: pattern {pattern!r} matches no parameter; names start with {', '.join(tops)}")
    return found
