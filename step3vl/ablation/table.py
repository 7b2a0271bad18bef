"""The table of an ablation: ours with spread, blind and majority; the paper's in a block of its own."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from step3vl.config import ConfigError

from .plot import plot_table
from .rows import Row, read_rows, table_folder

COLUMNS = ("row", "label", "capability", "mean", "low", "high", "num_seeds", "blind", "majority", "num_cases", "scale")


@dataclass
class Cell:
    """One capability of one row over seeds. low..high is the range over seeds, not an interval over cases."""

    mean: float
    low: float
    high: float
    num_seeds: int
    blind: float
    majority: float
    num_cases: int

    @property
    def text(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.mean:.3f}" + (f" ±{half:.3f}" if self.num_seeds > 1 else "")


def read_cells(row: Row) -> dict[str, Cell]:
    """Cells of a row over all its finished seeds; empty when none is finished."""
    folder = row.run_folder(0).parent
    seeds = sorted(int(p.name[5:]) for p in folder.glob("seed_*") if p.name[5:].isdigit())
    runs = [metrics for metrics in (row.metrics(seed) for seed in seeds) if metrics]
    names = runs[0]["scores"] if runs else {}
    return {name: _cell([run["scores"][name] for run in runs]) for name in names}


def _cell(scores: list[dict]) -> Cell:
    values = [s["score"] for s in scores]
    return Cell(
        mean=float(np.mean(values)),
        low=min(values),
        high=max(values),
        num_seeds=len(values),
        blind=float(np.mean([s["blind"] for s in scores])),
        majority=float(np.mean([s["majority"] for s in scores])),
        num_cases=scores[0]["num_cases"],
    )


def print_table(folder: Path, scale: str) -> None:
    """Print the table and write table.csv, table.md and table.png into the table's run folder."""
    rows = read_rows(folder, scale)
    cells = {row.file.stem: read_cells(row) for row in rows}
    if not any(cells.values()):
        raise ConfigError(f"no finished run of {folder} at {scale} scale: step3vl ablate run {folder} --scale {scale}")
    out = table_folder(folder, scale)
    titles = [rows[0].info.get("table", folder.name), scale_title(rows, scale)]
    ours, paper = _our_rows(rows, cells), paper_rows([row for row in rows if row.paper])
    console = Console()
    _print_block(console, "  ".join(titles), ours)
    _print_block(
        console, "The paper's numbers for the same rows (its scale, its data; not comparable with ours)", paper
    )
    notes = [str(note) for note in rows[0].info.get("notes", [])]
    if missing := [row.label for row in rows if not cells[row.file.stem]]:
        notes.append(f"Not run: {'; '.join(missing)}.")
    for note in notes:
        console.print(f"- {note}", highlight=False)
    _write_csv(out / "table.csv", rows, cells, scale)
    lines = [f"## {titles[0]}", "", f"**{titles[1]}**", "", *markdown(ours), "", "### The paper, same rows", ""]
    lines += [
        *markdown(paper),
        "",
        *[f"- {note}" for note in notes],
        "",
        f"![curves and scores]({out.name}.png)",
        "",
    ]
    (out / "table.md").write_text("\n".join(lines).replace(f"{out.name}.png", "table.png"))
    plot_table(out / "table.png", " ".join(titles), rows, cells)
    console.print(f"wrote {out}/table.csv, table.md, table.png", highlight=False)


def scale_title(rows: list[Row], scale: str) -> str:
    """What a reader must know first: the scale, the size, the optimizer."""
    if scale == "paper":
        return "(paper scale)"
    found = [next((m["provenance"] for s in range(100) if (m := row.metrics(s))), None) for row in rows]
    counts = {f"{facts.get('num_parameters', 0) / 1e6:.1f}M" for facts in found if facts}
    size = f"{' or '.join(sorted(counts))} parameters" if counts else ""
    names = dict.fromkeys(facts.get("optimizer", "").rsplit(".", 1)[-1] for facts in found if facts)
    rule = " or ".join(names)
    return f"({scale.upper()} SCALE: {size}, {rule}, generated data; shows the wiring, not the paper's result)"


def _our_rows(rows: list[Row], cells: dict[str, dict[str, Cell]]) -> list[list[str]]:
    names = list(next(c for c in cells.values() if c))
    out = [["row", "", *names]]
    for row in rows:
        own = cells[row.file.stem]
        if not own:
            continue
        num_seeds = next(iter(own.values())).num_seeds
        out.append(
            [row.label, f"mean of {num_seeds} seed{'s' if num_seeds > 1 else ''}", *[own[n].text for n in names]]
        )
        out.append(["", "blind", *[f"{own[n].blind:.3f}" for n in names]])
    first = next(c for c in cells.values() if c)
    out.append(["majority", "", *[f"{first[n].majority:.3f}" for n in names]])
    out.append(["cases", "", *[str(first[n].num_cases) for n in names]])
    return out


def paper_rows(rows: list[Row]) -> list[list[str]]:
    """The paper's values of rows; a null is "not given"."""
    names = list(dict.fromkeys(name for row in rows for name in row.paper))
    values = [
        [row.label, *["not given" if row.paper.get(n) is None else str(row.paper[n]) for n in names]] for row in rows
    ]
    return [["row", *names], *values]


def _print_block(console: Console, title: str, lines: list[list[str]]) -> None:
    table = Table(title=title)
    for i, name in enumerate(lines[0]):
        table.add_column(name, justify="left" if i == 0 or not name else "right")
    for line in lines[1:]:
        table.add_row(*line, style="dim" if line[0] in ("", "majority", "cases") else None)
    console.print(table)


def markdown(lines: list[list[str]]) -> list[str]:
    """A table in Markdown; the first line is its head."""
    head = ["| " + " | ".join(lines[0]) + " |", "|" + " --- |" * len(lines[0])]
    return head + ["| " + " | ".join(line) + " |" for line in lines[1:]]


def _write_csv(path: Path, rows: list[Row], cells: dict[str, dict[str, Cell]], scale: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            for name, c in cells[row.file.stem].items():
                numbers = (c.mean, c.low, c.high, c.num_seeds, c.blind, c.majority, c.num_cases)
                writer.writerow([row.file.stem, row.label, name, *numbers, scale])
