"""Where a stage's first weights come from: `model.init_from`, a run or any other checkpoint, or one for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from step3vl.weights import load_parts


def load(vlm: nn.Module, sources: str | Mapping[str, str], ignore: Sequence[str]) -> list[str]:
    """Load what `sources` names into the model, a shard its own rows alone; returns a line about each source.

    Raises:
        ValueError: nothing is there, or it does not fit the model.
    """
    for path in [sources] if isinstance(sources, str) else sources.values():
        check_source(path)
    return [
        f"init_from {report.source.path}: {len(report.loaded)} tensors ({report.layout.name})"
        for report in load_parts(vlm, sources, ignore)
    ]


def check_source(path: str) -> None:
    """Raises ValueError when nothing is at `path`; for a run of ours it says which file makes it."""
    if Path(path).exists():
        return
    parts = Path(path).parts
    scale = "tiny" if parts[:2] == ("runs", "tiny") else "paper"
    inside = parts[2:] if scale == "tiny" else parts[1:]
    if parts[:1] != ("runs",) or not inside:
        raise ValueError(f"model.init_from: nothing is at {path}; give a run, a checkpoint's folder or file, or null")
    file = Path(*inside).with_name(f"{inside[-1]}.yaml")
    raise ValueError(
        f"model.init_from: there is no run at {path}; make it with: step3vl fit -c {file} --scale {scale}, or give "
        "another place, or null"
    )
