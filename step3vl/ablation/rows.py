"""Rows of a table, read without importing any model code; listed, and diffed key by key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from step3vl.config import ConfigError, compose, nearest


@dataclass
class Row:
    """One row: its file, label, the paper's values for it, and the composed configuration it runs."""

    file: Path
    scale: str
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        composed = compose([self.file], self.overrides, self.scale)
        self.config, self.info = composed.config, composed.row
        self.label = str(self.info.get("label", self.file.stem))
        self.paper: dict[str, Any] = self.info.get("paper") or {}

    @property
    def fingerprint(self) -> str:
        """Changes when anything that the row runs changes, the weights that it starts from included."""
        words = json.dumps(self.config, sort_keys=True, default=str)
        start = (self.config.get("model") or {}).get("init_args", {}).get("init_from")
        return hashlib.sha256("\n".join([words, *start_marks(start)]).encode()).hexdigest()[:16]

    def run_folder(self, seed: int) -> Path:
        return table_folder(self.file.parent, self.scale) / self.file.stem / f"seed_{seed}"

    def metrics(self, seed: int) -> dict | None:
        """metrics.json of a finished run of this very configuration, else None."""
        folder = self.run_folder(seed)
        done = folder / "row.json"
        if not done.is_file() or json.loads(done.read_text())["fingerprint"] != self.fingerprint:
            return None
        return json.loads((folder / "metrics.json").read_text())


def start_marks(init_from: str | dict[str, str] | None) -> list[str]:
    """Checksums of the weights in the runs that `init_from` names; none for other places, or where nothing is yet."""
    marks = []
    for path in [init_from] if isinstance(init_from, str) else list((init_from or {}).values()):
        saved = sorted(Path(path).glob("checkpoints/step-*/manifest.json"))
        if saved:
            files = json.loads(saved[-1].read_text())["files"]
            marks += [entry["xxh3_128"] for name, entry in sorted(files.items()) if name.endswith(".safetensors")]
    return marks


def read_rows(folder: Path, scale: str, overrides: Sequence[str] = ()) -> list[Row]:
    """The rows of a table in file order; files that start with '_' are bases."""
    files = sorted(p for p in folder.glob("*.yaml") if not p.name.startswith("_"))
    if not files:
        near = [str(p.parent) for p in Path("ablations").glob("*/_base.yaml")]
        raise ConfigError(f"{folder} holds no row (*.yaml); {nearest(str(folder), near)}")
    return sorted((Row(file, scale, list(overrides)) for file in files), key=lambda row: row.info.get("order", 0))


def table_folder(folder: Path, scale: str) -> Path:
    """Where a table's runs live: runs/[tiny/]ablations/<table>."""
    inside = folder.resolve()
    inside = inside.relative_to(Path.cwd()) if inside.is_relative_to(Path.cwd()) else Path(folder.name)
    return Path("runs", *([] if scale == "paper" else [scale])) / inside


def print_tables(root: Path, scale: str) -> None:
    """Every table below `root`: title, rows, finished seeds at this scale."""
    table = Table(title=f"Ablation tables ({scale} scale)")
    for title in ("folder", "table", "row", "label", "finished seeds"):
        table.add_column(title)
    bases = sorted(root.glob("*/_base.yaml"))
    if not bases:
        raise ConfigError(f"no table below {root}: a table is a folder with _base.yaml and one YAML a row")
    for base in bases:
        for row in read_rows(base.parent, scale):
            folder = row.run_folder(0).parent
            seeds = [int(p.name[5:]) for p in sorted(folder.glob("seed_*")) if p.name[5:].isdigit()]
            done = [str(seed) for seed in seeds if row.metrics(seed)]
            table.add_row(
                str(base.parent), row.info.get("table", ""), row.file.stem, row.label, ", ".join(done) or "none"
            )
        table.add_section()
    Console().print(table)


def print_diff(a: Path, b: Path, scale: str) -> None:
    """Only the keys in which two runs differ, after bases, cards and interpolation."""
    left, right = (flatten(compose([path], scale=scale).config) for path in (a, b))
    keys = [key for key in {**left, **right} if left.get(key, "-") != right.get(key, "-")]
    table = Table(title=f"{len(keys)} of {len(left | right)} keys differ ({scale} scale)")
    table.add_column("key", overflow="fold")
    table.add_column(a.stem, overflow="fold")
    table.add_column(b.stem, overflow="fold")
    for key in keys:
        table.add_row(key, str(left.get(key, "-")), str(right.get(key, "-")))
    Console().print(table)


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """{"a.b.c": value} of nested mappings; `init_args` is left out of the path."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    parts = [flatten(v, path if k == "init_args" else f"{path}.{k}".lstrip(".")) for k, v in node.items()]
    return {key: value for part in parts for key, value in part.items()}
