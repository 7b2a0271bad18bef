"""Loss curves and score bars of a table in one picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .rows import Row
    from .table import Cell


def read_curve(run_folder: Path, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """(steps, logged values) of a run over all its restarts; a step logged twice keeps its latest value."""
    points: dict[int, float] = {}
    for path in sorted(run_folder.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open() as file:
            for line in csv.DictReader(file):
                if line.get(name):
                    points[int(line["step"])] = float(line[name])
    steps = sorted(points)
    return np.asarray(steps), np.asarray([points[step] for step in steps])


def plot_table(out: Path, title: str, rows: list[Row], cells: dict[str, dict[str, Cell]]) -> None:
    """Left: training loss, mean and range over seeds. Right: score a capability, blind and majority beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(1, 1.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    colours = [f"C{i}" for i in range(10)]
    for i, row in enumerate(rows):
        folders = sorted(row.run_folder(0).parent.glob("seed_*[0-9]"))
        curves = [curve for curve in (read_curve(folder) for folder in folders) if len(curve[0]) > 1]
        if not curves:
            continue
        grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 200)
        losses = np.stack([_smooth(np.interp(grid, *curve)) for curve in curves])  # [seeds,200]
        label = f"{row.label} ({len(curves)} seed{'s' if len(curves) > 1 else ''})"
        left.plot(grid, losses.mean(0), color=colours[i], label=label)
        left.fill_between(grid, losses.min(0), losses.max(0), color=colours[i], alpha=0.25, linewidth=0)
    left.set(xlabel="optimizer step", ylabel="training loss (nats a supervised token)", title="Training loss")
    left.set_yscale("log")
    left.legend()
    names = list(next(c for c in cells.values() if c))
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        own = cells[row.file.stem]
        if not own:
            continue
        x = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * width
        means = np.asarray([own[n].mean for n in names])
        spans = np.abs(np.asarray([[own[n].low for n in names], [own[n].high for n in names]]) - means)
        right.bar(x, means, width * 0.92, yerr=spans, color=colours[i], capsize=3, label=row.label)
        blind = [own[n].blind for n in names]
        right.hlines(
            blind, x - width * 0.46, x + width * 0.46, colors="black", linewidth=2, label="blind" if i == 0 else None
        )
    first = next(c for c in cells.values() if c)
    majority = [first[n].majority for n in names]
    right.scatter(
        np.arange(len(names)), majority, marker="_", s=900, color="grey", linewidth=1.5, label="majority", zorder=3
    )
    labels = [f"{n}\n(n={first[n].num_cases})" for n in names]
    right.set_xticks(np.arange(len(names)), labels, fontsize=9)
    right.set(ylim=(0, 1), ylabel="score on held-out cases", title="Bars: mean over seeds, whiskers: range")
    marks = [
        (handle, text) for handle, text in zip(*right.get_legend_handles_labels()) if text in ("blind", "majority")
    ]
    right.legend(*zip(*marks), loc="upper right")  # colours are those of the curves
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _smooth(values: np.ndarray, width: int = 7) -> np.ndarray:
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")
