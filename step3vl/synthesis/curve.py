"""Accuracy against rollouts on held-out problems, before and after a synthesis stage.

The curve of `step3vl pacore train`: the trained and the untrained synthesiser over the same rollouts, a vote beside
them, and a control in which the trained one is shown messages about another problem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from step3vl.answering import open_answering
from step3vl.evaluate import model_hash
from step3vl.evaluation import Benchmark, Case
from step3vl.pacore.plot import plot_scaling
from step3vl.pacore.pool import fraction, in_band, read_pool
from step3vl.pacore.scaling import Scaling, scaling
from step3vl.types import Sampling

from .stage import Stage

AFTER, BEFORE, OWN = "trained", "untrained", "trained, of its own rollouts"
FOREIGN = "trained, of another problem's rollouts"


class Some(Benchmark):
    """Those cases of a benchmark that were chosen by id."""

    def __init__(self, whole: Benchmark, ids: set[str]):
        self.whole, self.ids = whole, ids
        self.score, self.scores = whole.score, whole.scores  # type: ignore[method-assign]
        self.vote = whole.vote  # type: ignore[method-assign]

    def cases(self, limit: int | None = None) -> list[Case]:
        return list(self.stream(limit))

    def stream(self, limit: int | None = None) -> Iterator[Case]:
        found = (case for case in self.whole.stream() if case.id in self.ids)
        return (case for number, case in enumerate(found) if limit is None or number < limit)


def measure(stage: Stage, console: Console, limit: int | None = None) -> Path:
    """Accuracy against rollouts of held-out problems in each source's band; writes scaling.json and a picture each.

    Rollouts are the starting checkpoint's, drawn anew, so that a band chosen by the pool's answers favours nobody. They
    are coordinated by the starting checkpoint and by the trained one; once more by the trained one with rollouts of its
    own; and, as a control, by the trained one with another problem's rollouts. Returns the folder.
    """
    out = stage.folder / "pacore"
    key = {"start": model_hash(Path(stage.start)), "trained": model_hash(stage.folder), "limit": limit}
    done = out / "scaling.json"
    if done.is_file() and json.loads(done.read_text())["provenance"]["key"] == key:
        console.print(f"{done}: measured before, kept", highlight=False)
        return out
    out.mkdir(parents=True, exist_ok=True)
    context = int(stage.composed.config["data"]["init_args"]["max_prompt_tokens"]) + stage.sampling.max_new_tokens
    widths = list(stage.composed.vars.get("curve", (1, 2, 4, 8, 16)))
    before, after = (open_answering(str(path), "", stage.batch) for path in (stage.start, stage.folder))
    curves: dict[str, dict[str, Scaling]] = {}
    for name, benchmark in stage.suite().items():
        source = stage.sources[name]
        problems = list(read_pool(stage.held_out(source)))
        ids = {problem.id for problem in in_band(problems, fraction(source.low), fraction(source.high))}
        if not ids:
            console.print(f"{name}: none of {len(problems)} held-out problems lies in the band", highlight=False)
            continue
        title = f"{stage.file.stem}, {len(ids)} of {len(problems)} problems in the band {source.low} to {source.high}"
        console.print(title, highlight=False)
        parts = {
            AFTER: (before, after, False),
            BEFORE: (before, before, False),
            OWN: (after, after, False),
            FOREIGN: (before, after, True),
        }
        own: dict[str, Scaling] = {}
        for label, (asked, synthesiser, foreign) in parts.items():
            with synthesiser.numbers:
                own[label] = scaling(
                    name,
                    Some(benchmark, ids),
                    asked.generator,
                    Sampling(**{**asdict(stage.sampling), "stop": (), "seed": stage.seed + 1_000_000}),
                    widths,
                    limit,
                    max(1, 4 * stage.batch // max(widths)),
                    synthesiser=synthesiser.generator,
                    foreign=foreign,
                    counter=synthesiser.counter,
                    max_context_tokens=context,
                    template=stage.template,
                )
        curves[name] = own
        console.print(comparison_table(name, own))
        others = {label: curve for label, curve in own.items() if label != AFTER}
        plot_scaling(out / f"{name}.png", own[AFTER], title, others)
    if not curves:
        console.print("no benchmark of the suite has the name of a source: no curve is drawn", highlight=False)
    facts = {"key": key, "sampling": asdict(stage.sampling), "file": str(stage.file), "scale": stage.scale}
    rows = {name: {label: asdict(curve) for label, curve in own.items()} for name, own in curves.items()}
    done.write_text(json.dumps({"curves": rows, "provenance": facts}, indent=2) + "\n")
    console.print(f"wrote {done}", highlight=False)
    return out


def comparison_table(name: str, curves: dict[str, Scaling]) -> Table:
    """One row a synthesiser and number of rollouts. Says where a vote is better."""
    table = Table(title=f"{name}, {next(iter(curves.values())).num_cases} held-out cases")
    for column in ("synthesis", "rollouts", "SeRe", "PaCoRe", "less SeRe", "95 %", "maj", "less maj", "p", "emergent"):
        table.add_column(column, justify="left" if column == "synthesis" else "right")
    for label, curve in curves.items():
        for p in curve.points:
            table.add_row(
                label,
                str(p.num_rollouts),
                f"{p.mean:.3f}",
                f"{p.pacore:.3f}",
                f"{p.gain:+.3f}",
                f"{p.gain_low:+.3f}..{p.gain_high:+.3f}",
                f"{p.voted:.3f}",
                f"{p.pacore_less_voted:+.3f}",
                f"{p.p_value:.3f}",
                "" if p.emergent is None else f"{p.emergent:.3f}",
            )
        table.add_section()
    last = next(iter(curves.values())).points[-1]
    better = "maj" if last.voted > last.pacore else "PaCoRe"
    table.caption = f"{better}@{last.num_rollouts} is the better one of maj and PaCoRe ({next(iter(curves))})"
    return table
