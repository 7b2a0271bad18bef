"""A chain of stages: every numbered experiment of a folder in order, each from the weights of the one before.

Runs live where `step3vl fit` puts them, runs/[tiny/]experiments/<chain>/<stage>. Finished ones are kept as long as
neither they nor a stage before them changed. At the end: one verdict line a stage, and all loss curves in one picture.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from step3vl.ablation import children
from step3vl.ablation.plot import read_curve
from step3vl.ablation.rows import Row, table_folder
from step3vl.ablation.run import LINE_EVERY_S, Job, report_failure
from step3vl.config import ConfigError, nearest
from step3vl.signals import EXIT_UNFINISHED, SignalNote

WINDOW = 5
"""Logged losses over which the first and the last of a verdict are averaged."""


@dataclass
class Link(Row):
    """One stage of a chain: a run without a seed folder, which is stale when a stage before it is."""

    before: Link | None = None

    @property
    def fingerprint(self) -> str:
        own = super().fingerprint
        return own if self.before is None else hashlib.sha256((self.before.fingerprint + own).encode()).hexdigest()[:16]

    @property
    def seed(self) -> int:
        return int(self.config.get("seed_everything") or 0)

    def run_folder(self, seed: int) -> Path:
        return table_folder(self.file.parent, self.scale) / self.file.stem


def read_links(folder: Path, scale: str, overrides: Sequence[str] = ()) -> list[Link]:
    """The stages of a chain: files named <number>_<name>.yaml, by number. Raises ConfigError when there is none."""
    numbered = {path: re.match(r"\d+(?=_)", path.name) for path in folder.glob("*.yaml")}
    files = sorted((int(match[0]), path) for path, match in numbered.items() if match)
    if not files:
        near = sorted({str(p.parent) for p in Path("experiments").glob("*/1_*.yaml")})
        raise ConfigError(f"{folder} holds no numbered stage (1_*.yaml, ...); {nearest(str(folder), near)}")
    links: list[Link] = []
    for _, path in files:
        link = Link(path, scale, list(overrides), before=links[-1] if links else None)
        if is_pooled(link):
            continue
        links.append(link)
    return links


def is_pooled(link: Link) -> bool:
    """Whether a stage needs pools of answers, which `step3vl pacore train` makes before it trains."""
    return str(link.config["model"]["class_path"]).endswith(".PaCoReStage")


def run_chain(folder: Path, scale: str, overrides: Sequence[str] = ()) -> int:
    """Train and score every stage in order.

    Returns 0 when all finished, 1 when one failed (no other follows), 85 when a signal stopped it.
    """
    console = Console()
    links = read_links(folder, scale, overrides)
    with children.note_stops() as note:
        for link in links:
            if link.metrics(link.seed) is not None:
                console.print(f"{link.file.stem}: finished before, kept", highlight=False)
                continue
            job = Job(link, link.seed)
            job.prepare()
            for phase in ("fit", "test"):
                console.print(f"{link.file.stem}: {phase}, log in {job.log}", highlight=False)
                status = _run(job, phase, note, console)
                if note.seen:
                    return children.exit_status(note, console)
                if status != 0:
                    report_failure(job, console)
                    return EXIT_UNFINISHED if job.was_stopped else 1
            job.finish()
    console.print(f"\n{folder} at {scale} scale; blind = the same model, images masked", highlight=False)
    for link in links:
        console.print(verdict(link), markup=False, highlight=False, soft_wrap=True)
    out = table_folder(folder, scale) / "chain.png"
    plot_chain(out, f"{folder} ({scale} scale)", links)
    console.print(f"wrote {out}", highlight=False)
    return 0


def verdict(link: Link) -> str:
    """One line: steps, loss from first to last, each score beside its blind row, how many are above it."""
    metrics = link.metrics(link.seed)
    name, steps, losses = curve_of(link)
    if metrics is None or not len(steps):
        return f"{link.file.stem:<20} not finished"
    num = link.config["trainer"]["max_steps"]
    first, last = losses[:WINDOW].mean(), losses[-WINDOW:].mean()
    scores = metrics["scores"]
    cells = "  ".join(f"{name} {s['score']:.2f} ({s['blind']:.2f})" for name, s in scores.items())
    mean, blind = (float(np.mean([s[key] for s in scores.values()])) for key in ("score", "blind"))
    above = sum(s["score"] > s["blind"] for s in scores.values())
    sampling = link.config["model"]["init_args"].get("sampling") or {}  # an encoder alone has none
    temperature = sampling.get("temperature", 0)
    how = f" at temperature {temperature:g}" if temperature else ""
    return (
        f"{link.file.stem:<20} {num} steps  {name} {first:.3f} -> {last:.3f}  "
        f"score{how} (blind): mean {mean:.3f} ({blind:.3f})  {cells}  {above} of {len(scores)} above blind"
    )


def curve_of(link: Link) -> tuple[str, np.ndarray, np.ndarray]:
    """("reward" where rollouts are learnt from, else "loss", steps, logged values)."""
    for name in ("reward", "loss"):
        steps, values = read_curve(link.run_folder(link.seed), name)
        if len(steps):
            break
    return name, steps, values


def plot_chain(out: Path, title: str, links: Sequence[Link]) -> None:
    """Left: loss of all stages end to end. Right: mean held-out score after each stage, blind beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(1.6, 1), layout="constrained")
    figure.suptitle(title, fontsize=10)
    start = 0
    found: dict[str, list[dict]] = {}
    for i, link in enumerate(links):
        name, steps, losses = curve_of(link)
        marker, what = "." if len(steps) < 3 else None, f"{link.file.stem}{' (reward)' if name == 'reward' else ''}"
        left.plot(start + steps, losses, color=f"C{i}", marker=marker, label=what)
        left.axvline(start, color="grey", linewidth=0.5)
        start += max(int(link.config["trainer"]["max_steps"]), int(steps[-1]) + 1 if len(steps) else 0)
        for name, score in (link.metrics(link.seed) or {"scores": {}})["scores"].items():
            found.setdefault(name, []).append(score)
    left.set(xlabel="optimizer step, stages end to end", ylabel="training loss (nats a supervised token), or reward")
    left.set(title="Training loss; stages train on different mixtures", yscale="log")
    left.legend()
    for i, (name, scores) in enumerate(found.items()):
        at = range(len(links) - len(scores), len(links))  # a benchmark that comes later stays to the end
        right.plot(at, [s["score"] for s in scores], color=f"C{i}", marker="o", label=name)
        right.plot(at, [s["blind"] for s in scores], color=f"C{i}", linestyle=":")
    common = [scores for scores in found.values() if len(scores) == len(links)]
    if common:
        means = np.mean([[s["score"] for s in scores] for scores in common], axis=0)
        right.plot(means, color="black", linewidth=3, marker="s", label="mean")
    right.set_xticks(range(len(links)), [link.file.stem.replace("_", "\n", 1) for link in links], fontsize=8)
    right.set(ylim=(0, 1), ylabel="score on held-out cases", title="After each stage; dotted: blind")
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _run(job: Job, phase: str, note: SignalNote, console: Console) -> int:
    """One child process to its end, or to ours, with a line from its log now and then."""
    job.start(phase, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    assert job.process is not None
    last_s = time.monotonic()
    try:
        while job.process.poll() is None and not note.seen:
            time.sleep(children.POLL_S)
            if time.monotonic() - last_s > LINE_EVERY_S:
                last_s = time.monotonic()
                console.print(f"{job.row.file.stem}: {job.last_line()}", markup=False, highlight=False)
    finally:
        children.end([job.process], note, console)
    return job.process.returncode
