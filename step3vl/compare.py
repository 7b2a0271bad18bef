"""`step3vl compare A B`: two evaluations of the same cases, paired; what differs beyond chance, and on which cases."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from step3vl.evaluation.statistics import difference

Rows = dict[str, dict[str, list[dict[str, Any]]]]


def run(args: Sequence[str]) -> int:
    """The verb. Mistakes are ValueErrors with one sentence."""
    parser = argparse.ArgumentParser(prog="step3vl compare")
    parser.add_argument("a", type=Path, help="folder with the cases.jsonl of one evaluation")
    parser.add_argument("b", type=Path, help="of the other")
    parser.add_argument("--cases", type=Path, default=None, metavar="CSV", help="write both answers to every case")
    options = parser.parse_args(args)
    a, b = (read_cases(folder) for folder in (options.a, options.b))
    common = [name for name in a if name in b]
    if not common:
        raise ValueError(f"{options.a} ({', '.join(a)}) and {options.b} ({', '.join(b)}) share no benchmark")
    table = Table(title=f"B - A on the same cases; A: {options.a}, B: {options.b}")
    for title in ("benchmark", "A", "B", "B - A", "95 % interval", "p", "cases", "better", "worse"):
        table.add_column(title, justify="left" if title == "benchmark" else "right")
    for name in common:
        found = difference(_means(a[name]), _means(b[name]))
        table.add_row(
            name,
            f"{found.a:.3f}",
            f"{found.b:.3f}",
            f"{found.difference:+.3f}",
            f"{found.low:+.3f}..{found.high:+.3f}",
            f"{found.p_value:.4f}",
            str(found.num_cases),
            str(found.num_better),
            str(found.num_worse),
        )
        left = [len(rows[name]) - found.num_cases for rows in (a, b)]
        if any(left):
            print(f"{name}: {left[0]} cases of A and {left[1]} of B have no partner and are left out")
    Console().print(table)
    if options.cases is not None:
        write_cases(options.cases, a, b)
        print(f"wrote {options.cases}")
    return 0


def read_cases(folder: Path) -> Rows:
    """Answers by benchmark and case."""
    file = folder if folder.is_file() else folder / "cases.jsonl"
    if not file.is_file():
        raise ValueError(f"there is no {file}; make it with step3vl eval, or step3vl test")
    found: Rows = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found.setdefault(row["benchmark"], {}).setdefault(row["id"], []).append(row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}, line {number} is not an answer") from None
    return found


def write_cases(out: Path, a: Rows, b: Rows) -> None:
    """A line a case that both were asked, the largest differences first."""
    lines = []
    for name in a:
        for id in a[name]:
            if id in b.get(name, {}):
                one, other = a[name][id], b[name][id]
                scores = [float(np.mean([row["score"] for row in rows])) for rows in (one, other)]
                lines.append(
                    [name, id, *scores, one[0]["answer"], one[0]["said"], other[0]["said"], one[0]["question"]]
                )
    lines.sort(key=lambda line: -abs(line[3] - line[2]))
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["benchmark", "id", "score_a", "score_b", "answer", "said_a", "said_b", "question"])
        writer.writerows(lines)


def _means(rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    return {id: float(np.mean([row["score"] for row in group])) for id, group in rows.items()}
