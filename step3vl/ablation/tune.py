"""`ablate tune`: the same small grid of learning rates for every row, on a seed that no row of the table uses.

A table's budget card names the values of each row (`vars.grid`) and the rate in use (`vars.rates`); a row reads its
own, `${vars.rates.ROW}`. Tuning writes what it found beside the table's runs and changes no file: rates are read from
the card, so that a row means the same wherever it runs, and the report prints both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from step3vl.config import ConfigError, compose, nearest

from .intervals import final_loss
from .plot import read_curve
from .rows import Row, read_rows, table_folder
from .run import Job, run_jobs

SEED = 100


@dataclass
class TuningRow(Row):
    """A row with one rate of the grid and fewer steps."""

    rate: str = ""
    rates: dict[str, Any] = field(default_factory=dict)

    def run_folder(self, seed: int) -> Path:
        return table_folder(self.file.parent, self.scale) / self.file.stem / f"tune_{self.rate}"


def tune_table(folder: Path, scale: str, max_steps: int, num_jobs: int | None = None, only: Sequence[str] = ()) -> int:
    """Train every row of the grid with each of its rates; returns 0 when all finished, 85 when stopped, else 1."""
    grid, used = read_grid(folder, scale)
    for name in only:
        if name not in grid:
            raise ConfigError(f"{folder}: vars.grid has no row {name!r}; {nearest(name, list(grid))}")
    jobs = []
    for row in read_rows(folder, scale):
        name = row.file.stem
        if name in grid and (not only or name in only):
            for rate in grid[name]:
                keys = [f"vars.rates.{name}={rate}", f"trainer.max_steps={max_steps}"]
                jobs.append(Job(TuningRow(row.file, scale, keys, rate=str(rate)), SEED, last_phase="fit"))
    status = run_jobs(jobs, num_jobs)
    if status:
        return status
    found: dict[str, Any] = {"seed": SEED, "max_steps": max_steps, "rows": {}}
    for name in grid:
        own = [job for job in jobs if job.row.file.stem == name]
        losses = {job.row.rate: final_loss(read_curve(job.folder)) for job in own if isinstance(job.row, TuningRow)}
        if losses:
            best = min(losses, key=lambda rate: losses[rate])
            found["rows"][name] = {"losses": losses, "best": best, "used": used.get(name)}
            shown = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in losses.items())
            Console().print(f"{name}: {shown}; lowest {best}, in use {used.get(name)}", highlight=False)
    out = table_folder(folder, scale) / "tuning.json"
    earlier = read_tuning(folder, scale)
    if earlier is not None and earlier["max_steps"] == max_steps:
        found["rows"] = earlier["rows"] | found["rows"]
    out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def read_grid(folder: Path, scale: str) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(values of each row, rate in use of each row). Raises ConfigError when the table has no grid."""
    vars_ = compose([folder / "_base.yaml"], scale=scale).vars
    if not vars_.get("grid"):
        raise ConfigError(f"{folder}: its budget card has no `grid` at {scale} scale: {{row: [rate, ...]}}")
    return vars_["grid"], vars_.get("rates") or {}


def read_tuning(folder: Path, scale: str) -> dict[str, Any] | None:
    """What tuning found, or None."""
    path = table_folder(folder, scale) / "tuning.json"
    return json.loads(path.read_text()) if path.is_file() else None
