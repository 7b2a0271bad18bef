"""Lightning's checkpoint dictionary in two: tensors by name, which every rank saves its rows of, and all the rest.

The rest (loops, schedules, callbacks, place in the data, random numbers) is small, the same on all ranks, and read with
weights_only.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step3vl.weights.pieces import Pieces, read_like
from step3vl.weights.source import MODEL

REST = "state.pt"


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], bytes]:
    """(tensors by name, the rest in bytes). Names are `model/NAME` and `optimizer/K/PARAMETER/ENTRY`."""
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tensors = {MODEL + name: tensor for name, tensor in checkpoint["state_dict"].items()}
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"the model's state {odd[0]!r} is no tensor and cannot be saved")
    if "optimizer_states" in checkpoint:
        rest["optimizers"] = []
        for k, state in enumerate(checkpoint["optimizer_states"]):
            names, plain = _names(state["param_groups"]), {}
            for index, entries in state["state"].items():
                tensors |= {
                    f"optimizer/{k}/{names[index]}/{entry}": value
                    for entry, value in entries.items()
                    if isinstance(value, Tensor)
                }
                plain[index] = {entry: value for entry, value in entries.items() if not isinstance(value, Tensor)}
            rest["optimizers"].append({"param_groups": state["param_groups"], "plain": plain})
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    return tensors, buffer.getvalue()


def read_checkpoint(
    folder: Path, model: Mapping[str, Tensor] | None = None, parameters: Sequence[Sequence[Tensor]] | None = None
) -> dict[str, Any]:
    """Lightning's dictionary from a checkpoint that `runs.choose` has approved.

    Args:
        folder: the checkpoint.
        model: tensors by name that the model's will be copied into; where these are sharded, only own rows are read.
        parameters: of each optimizer, in its order; moments are sharded as they are. None: everything is read whole.
    """
    source, like = Pieces(folder), model or {}
    names = list(source.keys())
    try:
        checkpoint = torch.load(folder / REST, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{folder / REST} holds more than plain data, and reading it could run code") from None
    checkpoint["state_dict"] = {
        name.removeprefix(MODEL): read_like(source, name, like.get(name.removeprefix(MODEL)))
        for name in names
        if name.startswith(MODEL)
    }
    if "optimizers" not in checkpoint:
        return checkpoint
    checkpoint["optimizer_states"] = []
    for k, saved in enumerate(checkpoint.pop("optimizers")):
        numbers = {name: index for index, name in _names(saved["param_groups"]).items()}
        state = saved["plain"]
        for full in names:
            if full.startswith(f"optimizer/{k}/"):
                name, entry = full.split("/", 2)[2].rsplit("/", 1)
                index = numbers[name]
                parameter = parameters[k][index] if parameters and index < len(parameters[k]) else None
                state.setdefault(index, {})[entry] = read_like(source, full, parameter)
        checkpoint["optimizer_states"].append({"state": state, "param_groups": saved["param_groups"]})
    return checkpoint


def _names(groups: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Names of an optimizer's parameters by number; the number itself where the optimizer was given no names."""
    pairs = [(group["params"], group.get("param_names", group["params"])) for group in groups]
    return {index: str(name) for indices, names in pairs for index, name in zip(indices, names)}
