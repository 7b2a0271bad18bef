"""Parameter groups by name pattern. A pattern without effect is an error, because it would silently change nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

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
    """Switch off gradients of every parameter whose name matches one of `patterns`; ValueError if one matches none."""
    for pattern in patterns:
        for name in matching(module, pattern, "freeze"):
            module.get_parameter(name).requires_grad_(False)


def build_groups(module: nn.Module, groups: Sequence[ParamGroup] = ()) -> list[dict]:
    """Trainable parameters as torch groups of (name, parameter): each in exactly one, the first whose pattern matches.

    What no pattern matches is the group `default`. Parameters with fewer than two axes (norms, biases, LayerScale) form
    groups of their own without weight decay, as AdamW recipes for transformers do, unless their ParamGroup sets one.

    Raises:
        ValueError: a pattern matches nothing, or nothing that an earlier pattern leaves; or all parameters are frozen.
    """
    owners: dict[str, ParamGroup] = {}
    for group in groups:
        found = matching(module, group.pattern, "param_groups")
        free = [name for name in found if name not in owners]
        if not free:
            earlier = sorted({owners[name].pattern for name in found})
            raise ValueError(
                f"param_groups: pattern {group.pattern!r} has no effect: all it matches is taken by "
                f"{' and '.join(map(repr, earlier))} before it; put the narrower pattern first"
            )
        owners.update(dict.fromkeys(free, group))
    buckets: dict[tuple[str, bool], dict] = {}
    for name, parameter in module.named_parameters():  # a tied parameter comes once, under its first name
        if not parameter.requires_grad:
            continue
        owner = owners.get(name)
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


def matching(module: nn.Module, pattern: str, key: str) -> list[str]:
    """Names of parameters that match `pattern`; ValueError with `key` and near names when there is none."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
    names = [name for name, _ in module.named_parameters()]
    found = [name for name in names if expression.search(name)]
    if found:
        return found
    for alias, parameter in module.named_parameters(remove_duplicate=False):
        if expression.search(alias):
            name = next(name for name, other in module.named_parameters() if other is parameter)
            raise ValueError(f"{key}: pattern {pattern!r} matches {alias}, which is tied to {name}: use that name")
    raise ValueError(f"{key}: pattern {pattern!r} matches no parameter; {near_names(pattern, names)}")


def near_names(pattern: str, names: Sequence[str]) -> str:
    """For the end of an error message: what the pattern may have meant, or how names start."""
    paths = [name.split(".") for name in names]
    parts = {".".join(path[: i + 1]) for path in paths for i in range(len(path))} | {p for path in paths for p in path}
    close = get_close_matches(pattern.replace("\\", "").strip("^$.*"), sorted(parts), n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    tops = sorted({".".join(name.split(".")[:2]) for name in names})
    return f"names start with {', '.join(tops)}"
