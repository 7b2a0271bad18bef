"""`ablate report`: one page a table, written from the runs alone: ours with intervals, the paper's, and what agrees.

Nothing on the page is typed by hand but the row files' own words (labels, notes, claims); every number comes from
`metrics.json`, `cases.jsonl` and the loss curves, and every verdict from an interval.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from step3vl.config import ConfigError

from .claims import Claim, Verdict, judge
from .intervals import interval, mean_interval
from .plot import plot_table
from .rows import Row, flatten, read_rows, table_folder
from .runs import RowRuns, per_run, read_runs
from .table import markdown, paper_rows, read_cells, scale_title
from .tune import read_grid, read_tuning

OWN_KEYS = ("model", "data", "trainer", "suite", "seed_everything")


def write_page(folder: Path, scale: str, out: Path) -> Path:
    """Write `<out>/<table>.md` and `.png` of the finished runs; returns the page. Raises ConfigError without any."""
    rows = read_rows(folder, scale)
    runs = {row.file.stem: read_runs(row) for row in rows}
    done = [own for own in runs.values() if own.seeds]
    if not done:
        raise ConfigError(f"no finished run of {folder} at {scale} scale: step3vl ablate run {folder} --scale {scale}")
    stem = folder.resolve().name.partition("_")[0]
    level = loss_level(done)
    claims = [Claim.read(data, f"{folder}/_base.yaml") for data in rows[0].info.get("claims", [])]
    verdicts = [judge(claim, runs, level) for claim in claims]
    lines = [f"# {rows[0].info.get('table', folder.name)}", "", f"**{scale_title(rows, scale)}**", ""]
    lines += [*_origin(folder, scale, done), "", "## Ours", "", *_ours(rows, runs), ""]
    lines += [f"![training loss and scores]({stem}.png)", ""]
    lines += ["## Against the first row", "", *_differences(rows, runs), ""]
    lines += ["## How fast the loss falls", "", *_convergence(rows, runs, level), ""]
    lines += ["## The paper's words, and these runs", "", *_verdicts(verdicts), ""]
    lines += ["## The paper's numbers for its rows", "", *markdown(paper_rows([row for row in rows if row.paper])), ""]
    lines += [*_tuning(folder, scale, rows), "## What differs between the rows", "", *_deltas(rows), ""]
    lines += ["## What to keep in mind", "", *[f"- {note}" for note in rows[0].info.get("notes", [])], ""]
    lines += ["## Cost and commands", "", *_cost(folder, scale, rows, runs)]
    out.mkdir(parents=True, exist_ok=True)
    cells = {row.file.stem: read_cells(row) for row in rows}
    plot_table(out / f"{stem}.png", f"{rows[0].info.get('table', stem)} ({scale} scale)", rows, cells)
    page = out / f"{stem}.md"
    page.write_text("\n".join(lines) + "\n")
    Console().print(f"wrote {page} and {stem}.png", highlight=False)
    return page


def loss_level(runs: Sequence[RowRuns]) -> float:
    """The loss that steps are counted to: what the slowest of the paper's rows ends with, mean over its seeds."""
    own = [one for one in runs if one.row.paper] or list(runs)
    return max(float(one.final_loss().mean()) for one in own)


def _origin(folder: Path, scale: str, runs: Sequence[RowRuns]) -> list[str]:
    facts = [metrics.get("provenance", {}) for own in runs for metrics in own.metrics]
    commits = sorted({str(fact.get("commit")) for fact in facts})
    times = sorted(str(fact.get("time")) for fact in facts)
    seeds = sorted({seed for own in runs for seed in own.seeds})
    device = ", ".join(sorted({str(fact.get("device")) for fact in facts}))
    return [
        f"Written by `step3vl ablate report {folder} --scale {scale}` from {len(facts)} finished runs, seeds "
        f"{', '.join(map(str, seeds))}, of {times[0][:10]} to {times[-1][:10]}; commit {', '.join(commits)}; {device}. "
        "Brackets are 95 % intervals over seeds and cases together (paired where rows are compared)."
    ]


def _ours(rows: Sequence[Row], runs: dict[str, RowRuns]) -> list[str]:
    first = next(own for own in runs.values() if own.seeds)
    names = first.capabilities
    lines = [["row", "seeds", *names, "mean"]]
    for row in rows:
        own = runs[row.file.stem]
        if not own.seeds:
            lines.append([row.label, "not run", *["-"] * (len(names) + 1)])
            continue
        cells = [interval(own.scores(name)).text for name in names]
        lines.append([row.label, str(len(own.seeds)), *cells, own.overall().text])
        blind = [own.blind(name) for name in names]
        lines.append(["blind", "", *["-" if b is None else f"{b.mean():.3f}" for b in blind], ""])
    scores = first.metrics[0]["scores"]
    lines.append(["majority", "", *[f"{scores[name]['majority']:.3f}" for name in names], ""])
    lines.append(["cases", "", *[str(first.scores(name).shape[1]) for name in names], ""])
    return [*markdown(lines), "", "Blind: the same model without the image. Majority: always the commonest answer."]


def _differences(rows: Sequence[Row], runs: dict[str, RowRuns]) -> list[str]:
    first = next((runs[row.file.stem] for row in rows if runs[row.file.stem].seeds), None)
    assert first is not None
    lines = [["row", *first.capabilities, "mean"]]
    for row in rows:
        own = runs[row.file.stem]
        if own is first or not own.seeds or not set(own.seeds) & set(first.seeds):
            continue
        blocks = [np.subtract(*own.paired(first, name)) for name in first.capabilities]
        cells = [_starred(interval(block)) for block in blocks]
        lines.append([row.label, *cells, _starred(mean_interval(blocks))])
    if len(lines) == 1:
        return ["Only one row is finished."]
    explained = f"Score less that of {first.row.label}, the same cases and seeds. `*`: the interval leaves 0 out."
    return [*markdown(lines), "", explained]


def _starred(found) -> str:
    return found.signed + (" *" if found.low > 0 or found.high < 0 else "")


def _convergence(rows: Sequence[Row], runs: dict[str, RowRuns], level: float) -> list[str]:
    head = [f"steps to a loss of {level:.3f}", "not reached", "mean loss of the run", "loss of the last tenth"]
    lines = [["row", *head]]
    for row in rows:
        own = runs[row.file.stem]
        if not own.seeds:
            continue
        steps = own.steps_to(level)
        reached = steps[~np.isnan(steps)]
        words = f"{reached.mean():.0f} ({', '.join(f'{s:.0f}' for s in reached)})" if len(reached) else "-"
        missing = f"{len(steps) - len(reached)} of {len(steps)}"
        lines.append([row.label, words, missing, per_run(own.mean_loss()).text, per_run(own.final_loss()).text])
    explained = (
        "The loss is the training loss in nats a supervised token, a running mean of 7 logged values; the level is "
        "what the slowest of the paper's rows ends with. In brackets: single seeds, or the interval over seeds."
    )
    return [*markdown(lines), "", explained]


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return ["The table's _base.yaml makes no claim."]
    lines = [["claim", "whose", "measure", "difference here", "seeds that agree", "verdict"]]
    for verdict in verdicts:
        claim = verdict.claim
        measure = claim.measure if isinstance(claim.measure, str) else ", ".join(claim.measure)
        gap = "-" if verdict.interval is None else _number(verdict, measure)
        note = f" ({verdict.censored} runs never reached it: their length)" if verdict.censored else ""
        what = f"{measure}: {claim.of} less {claim.against}"
        lines.append([claim.text, claim.source, what, gap + note, verdict.signs, f"**{verdict.word}**"])
    explained = (
        "A verdict follows from the interval: `agrees` when it lies wholly on the claimed side of 0 (or within the "
        "margin, where no difference is claimed), `contradicts` when wholly on the other side, else `undecided`. "
        "Three seeds alone cannot reach p = 0.05 in a sign test."
    )
    return [*markdown(lines), "", explained]


def _number(verdict: Verdict, measure: str) -> str:
    found = verdict.interval
    assert found is not None
    if measure == "steps_to_loss":
        return f"{found.mean:+.0f} [{found.low:+.0f}, {found.high:+.0f}]"
    margin = f", margin {verdict.claim.margin:g}" if verdict.claim.direction == "none" else ""
    return found.signed + margin


def _tuning(folder: Path, scale: str, rows: Sequence[Row]) -> list[str]:
    found = read_tuning(folder, scale)
    if found is None:
        return []
    labels = {row.file.stem: row.label for row in rows}
    used = read_grid(folder, scale)[1]
    lines = [["row", "learning rate: loss", "lowest", "used"]]
    for name, entry in found["rows"].items():
        tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in entry["losses"].items())
        lines.append([labels.get(name, name), tried, entry["best"], str(used.get(name, "-"))])
    explained = (
        f"Mean training loss of the last tenth of {found['max_steps']} steps, seed {found['seed']}, which no row of "
        f"the table uses; `step3vl ablate tune {folder} --scale {scale} --steps {found['max_steps']}`. Rows use what "
        "the table's budget card says."
    )
    return ["## Learning rates tried", "", *markdown(lines), "", explained, ""]


def _deltas(rows: Sequence[Row]) -> list[str]:
    """Keys in which a row differs from the first; data, order and budget are among the compared ones."""
    flat = [flatten({key: row.config.get(key) for key in OWN_KEYS}) for row in rows]
    lines = []
    for row, own in zip(rows[1:], flat[1:]):
        keys = [key for key in {**flat[0], **own} if flat[0].get(key, "-") != own.get(key, "-")]
        shared = sorted({key.rpartition(".")[0] for key in keys if key.startswith("model.vlm.vision_encoder")})
        own_keys = [key for key in keys if not key.startswith("model.vlm.vision_encoder")]
        shown = [f"`{key}`: {flat[0].get(key, '-')} -> {own.get(key, '-')}" for key in own_keys]
        if shared:
            shown.insert(0, f"`model.vlm.vision_encoder` ({len(keys) - len(own_keys)} keys)")
        lines.append(f"- {row.label}: {'; '.join(shown) or 'nothing'}")
    other = "Everything else is equal: data, their order (a seed's), tokens, steps, schedule, scoring."
    return [*lines, "", f"Against {rows[0].label}. {other}"]


def _cost(folder: Path, scale: str, rows: Sequence[Row], runs: dict[str, RowRuns]) -> list[str]:
    lines = [["row", "parameters", "tokens a run", "CPU minutes, all seeds"]]
    for row in rows:
        own = runs[row.file.stem]
        if own.seeds:
            size = own.metrics[0].get("provenance", {}).get("num_parameters", 0)
            tokens = float(np.mean(own.last("tokens")))
            lines.append([row.label, f"{size:,}", f"{tokens:,.0f}", f"{own.cpu_s() / 60:.1f}"])
    total = sum(own.cpu_s() for own in runs.values()) / 60
    num = max(len(own.seeds) for own in runs.values())
    run = f"step3vl ablate run {folder} --scale {scale} --seeds {num}"
    where = os.fspath(table_folder(folder, scale))
    return [
        *markdown(lines),
        "",
        f"{total:.0f} CPU minutes in all. Runs lie in `{where}`; finished ones are kept, and the same command goes on:",
        "",
        "```bash",
        run,
        f"step3vl ablate report {folder} --scale {scale}",
        "```",
    ]
