"""The finished runs of a row, read once: scores case by case, loss curves, and what they cost."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .intervals import Interval, final_loss, interval, mean_interval, overlap, read_scores, steps_to
from .plot import read_curve
from .rows import Row


@dataclass
class RowRuns:
    """A row and its finished seeds, in order."""

    row: Row
    seeds: list[int]

    @property
    def name(self) -> str:
        return self.row.file.stem

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [self.row.metrics(seed) or {} for seed in self.seeds]

    @cached_property
    def cases(self) -> list[dict[str, dict[str, tuple[float, float | None]]]]:
        return [read_scores(self.row.run_folder(seed)) for seed in self.seeds]

    @cached_property
    def curves(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [read_curve(self.row.run_folder(seed)) for seed in self.seeds]

    @property
    def capabilities(self) -> list[str]:
        return list(self.cases[0]) if self.cases else []

    def scores(self, capability: str) -> np.ndarray:
        """[S,N] of the cases that all seeds answered."""
        return self.paired(self, capability)[0]

    def blind(self, capability: str) -> np.ndarray | None:
        """[S,N] without the image; None when the cases have none."""
        per_seed = [run[capability] for run in self.cases]
        ids = [case for case in overlap([list(run) for run in per_seed]) if per_seed[0][case][1] is not None]
        return np.array([[run[case][1] for case in ids] for run in per_seed], dtype=float) if ids else None

    def paired(self, other: RowRuns, capability: str) -> tuple[np.ndarray, np.ndarray]:
        """This row's and another's scores [S,N] of common seeds and cases. Raises ValueError when there are none."""
        seeds = [seed for seed in self.seeds if seed in other.seeds]
        mine = [self.cases[self.seeds.index(seed)][capability] for seed in seeds]
        theirs = [other.cases[other.seeds.index(seed)][capability] for seed in seeds]
        ids = overlap([list(run) for run in [*mine, *theirs]])
        if not ids:
            raise ValueError(f"{self.name} and {other.name} have no case of {capability} in common")
        return tuple(np.array([[run[case][0] for case in ids] for run in runs]) for runs in (mine, theirs))  # type: ignore[return-value]

    def overall(self) -> Interval:
        """Mean over capabilities."""
        return mean_interval([self.scores(name) for name in self.capabilities])

    def mean_loss(self) -> np.ndarray:
        """[S]: mean training loss over the whole run, which is lower the faster it falls."""
        return np.array([losses.mean() for _, losses in self.curves])

    def final_loss(self) -> np.ndarray:
        """[S]: mean training loss of the last tenth."""
        return np.array([final_loss(curve) for curve in self.curves])

    def steps_to(self, level: float) -> np.ndarray:
        """[S]: optimizer steps to a loss; NaN where it was not reached."""
        return np.array([steps_to(curve, level) for curve in self.curves])

    def last(self, column: str) -> list[float]:
        """The last logged value of a column, one a seed: cumulative `tokens`, `cpu_s`."""
        found = []
        for seed in self.seeds:
            total = 0.0
            for path in sorted(self.row.run_folder(seed).glob("csv/version_*/metrics.csv")):
                with path.open() as file:
                    values = [float(line[column]) for line in csv.DictReader(file) if line.get(column)]
                total = values[-1] if values else total
            found.append(total)
        return found

    def cpu_s(self) -> float:
        """CPU seconds of training and of scoring, all seeds together."""
        scoring = [run.get("provenance", {}).get("evaluation_cpu_s", 0.0) for run in self.metrics]
        return sum(self.last("cpu_s")) + sum(scoring)


def read_runs(row: Row) -> RowRuns:
    """Finished seeds of a row's present configuration."""
    folder: Path = row.run_folder(0).parent
    seeds = sorted(int(p.name[5:]) for p in folder.glob("seed_*") if p.name[5:].isdigit())
    return RowRuns(row, [seed for seed in seeds if row.metrics(seed)])


def per_run(values: np.ndarray) -> Interval:
    """Interval over seeds of a number a run, [S]."""
    return interval(values[:, None])
