"""`step3vl pacore train`: a synthesis stage from its pools to its curve, in order, each part kept once it is there.

A warm start where the stage names one; pools of the starting checkpoint's messages; the stage's own fit and test; and
accuracy against rollouts on held-out problems of the same band, before and after. `make_pools` and `measure` can be
called alone, so that a chain of stages runs them around its own fit.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from step3vl.ablation import children
from step3vl.ablation.rows import Row, table_folder
from step3vl.ablation.run import Job, report_failure
from step3vl.answering import Answering, open_answering
from step3vl.config import Composed, ConfigError, compose
from step3vl.data.shards import find_shards
from step3vl.evaluate import model_hash
from step3vl.evaluation import Benchmark, Case
from step3vl.pacore.plot import plot_scaling
from step3vl.pacore.pool import Built, Cases, PooledProblem, build_pool, fraction, in_band, read_pool
from step3vl.pacore.pool_data import PoolSource
from step3vl.pacore.references import known_samples, write_known, write_references
from step3vl.pacore.scaling import Scaling, scaling
from step3vl.pacore.template import SynthesisTemplate
from step3vl.signals import EXIT_UNFINISHED
from step3vl.types import Sampling

DATA = "step3vl.pacore.pool_data.PoolData"
AFTER, BEFORE, OWN = "trained", "untrained", "trained, of its own rollouts"


@dataclass(slots=True, kw_only=True)
class Stage:
    """What a stage's file says about its pools."""

    file: Path
    scale: str
    composed: Composed
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, scale: str, overrides: Sequence[str] = ()) -> Stage:
        """Raises ConfigError for a file whose data are no pools."""
        composed = compose([file], overrides, scale)
        found = (composed.config.get("data") or {}).get("class_path")
        if found != DATA:
            raise ConfigError(f"{file}: data is {found}; a stage that learns synthesis has data of {DATA}")
        return cls(file=file, scale=scale, composed=composed, overrides=list(overrides))

    @property
    def pools(self) -> Path:
        return Path(self.composed.config["data"]["init_args"]["root"])

    @property
    def sources(self) -> dict[str, PoolSource]:
        return {k: PoolSource(**v) for k, v in self.composed.config["data"]["init_args"]["sources"].items()}

    @property
    def start(self) -> str:
        """The checkpoint whose messages the pools hold, and that the stage starts from."""
        return str(self.composed.config["model"]["init_args"]["init_from"])

    @property
    def template(self) -> str | None:
        return self.composed.config["data"]["init_args"].get("template")

    @property
    def seed(self) -> int:
        return int(self.composed.config.get("seed_everything") or 0)

    @property
    def sampling(self) -> Sampling:
        """Messages are sampled as the stage's own rollouts are."""
        return Sampling(**self.composed.config["model"]["init_args"]["rollout"], seed=self.seed)

    @property
    def batch(self) -> int:
        return int(self.composed.config["model"]["init_args"]["rollouts_in_flight"])

    @property
    def folder(self) -> Path:
        """Of the run."""
        return table_folder(self.file.parent, self.scale) / self.file.stem

    def suite(self) -> dict[str, Benchmark]:
        """The benchmarks that a curve is drawn of: those with the name of a source."""
        cards = {k: v for k, v in (self.composed.config.get("suite") or {}).items() if k in self.sources}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--suite", type=dict[str, Benchmark])
        return parser.instantiate_classes(parser.parse_object({"suite": cards})).suite if cards else {}


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


def train(file: Path, scale: str, overrides: Sequence[str] = ()) -> int:
    """Warm start, pools, fit, test, curve, in this order; what an earlier call has finished is kept.

    Returns 0, 1 when a part failed, or 85 when a signal stopped it; the same call goes on.
    """
    console = Console()
    stage = Stage.read(file, scale, overrides)
    status = warm_start(stage, console) or make_pools(stage, console) or _fit(stage, file, ("fit", "test"), console)
    if status == 0:
        measure(stage, console)
    return status


def warm_start(stage: Stage, console: Console) -> int:
    """The supervised stages beside the file that `vars.warm_start` names, each with the kind of its shards.

    Nothing where it names none.
    """
    vars_ = stage.composed.vars
    if not vars_.get("warm_start"):
        return 0
    folder = stage.pools / "references"
    if not folder.is_dir():
        part = folder.with_name("references.part")
        data = stage.composed.config["data"]["init_args"]
        template = SynthesisTemplate(stage.template)
        questions = [f"Read row {row}." for row in range(1, 5)]
        root = Path(stage.composed.vars.get("data_root", "."))
        known = [one for pattern in vars_["warm_start_known"] for one in known_samples(str(root / pattern), 1500)]
        write_references(part, template, questions, known, 32_000, data["least_messages"], data["most_messages"])
        write_known(part, template, known, 5_000, data["least_messages"], data["most_messages"])
        part.rename(folder)
    own = [word for word in stage.overrides if word.startswith(("vars.runs=", "vars.data_root="))]
    for name, kind in vars_["warm_start"].items():
        shards = f"data.sources.references.shards={folder.resolve()}/{kind}-*.tar"
        if status := _fit(stage, stage.file.with_name(f"{name}.yaml"), ("fit",), console, [*own, shards]):
            return status
    return 0


def make_pools(stage: Stage, console: Console) -> int:
    """Messages of the starting checkpoint: to the sources' shards, and to held-out cases of the same names.

    Only what is missing is asked. A pool of another model or sampling is set aside. Returns 0.
    """
    root = stage.composed.vars.get("data_root", ".")
    held_out = stage.suite()
    answering = None
    for name, source in stage.sources.items():
        wanted: dict[Path, Callable[[], Cases]] = {}
        if source.shards is not None:
            pattern, num = str(Path(root) / source.shards), source.num_problems
            find_shards(pattern)
            wanted[stage.pools / source.pool] = lambda pattern=pattern, num=num: Cases.of_shards(pattern, num)  # type: ignore[misc]
        if name in held_out:
            benchmark = held_out[name]
            wanted[_held_out(stage, source)] = lambda n=name, b=benchmark: Cases.of_benchmark(n, b)  # type: ignore[misc]
        for pool, cases in wanted.items():
            mark, key = pool.with_suffix(".made.json"), _key(stage, name, source)
            if pool.is_file() and mark.is_file() and json.loads(mark.read_text()) == key:
                console.print(f"{pool}: made before, kept", highlight=False)
                continue
            answering = answering or open_answering(stage.start, "", stage.batch)
            built = _build(stage, pool, cases(), answering, key)
            mark.write_text(json.dumps(key) + "\n")
            console.print(f"{pool}: {built.num_problems} problems, {built.num_failed} answers failed", highlight=False)
    return 0


def measure(stage: Stage, console: Console, limit: int | None = None) -> Path:
    """Accuracy against rollouts of held-out problems in each source's band; writes scaling.json and a picture each.

    Rollouts are the starting checkpoint's, drawn anew, so that a band chosen by the pool's answers favours nobody. They
    are coordinated by the starting checkpoint and by the trained one; and once more by the trained one with rollouts of
    its own. Returns the folder.
    """
    out = stage.folder / "pacore"
    key = {"start": model_hash(Path(stage.start)), "trained": model_hash(stage.folder), "limit": limit}
    done = out / "scaling.json"
    if done.is_file() and json.loads(done.read_text())["provenance"]["key"] == key:
        console.print(f"{done}: measured before, kept", highlight=False)
        return out
    out.mkdir(parents=True, exist_ok=True)
    widths = list(stage.composed.vars.get("curve", (1, 2, 4, 8, 16)))
    before, after = (open_answering(str(path), "", stage.batch) for path in (stage.start, stage.folder))
    curves: dict[str, dict[str, Scaling]] = {}
    for name, benchmark in stage.suite().items():
        source = stage.sources[name]
        problems = list(read_pool(_held_out(stage, source)))
        ids = {problem.id for problem in _banded(problems, source)}
        if not ids:
            console.print(f"{name}: none of {len(problems)} held-out problems lies in the band", highlight=False)
            continue
        title = f"{stage.file.stem}, {len(ids)} of {len(problems)} problems in the band {source.low} to {source.high}"
        console.print(title, highlight=False)
        pairs = {AFTER: (before, after), BEFORE: (before, before), OWN: (after, after)}
        own: dict[str, Scaling] = {}
        for label, (asked, synthesiser) in pairs.items():
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
                    counter=synthesiser.counter,
                    max_context_tokens=_context(stage),
                    template=stage.template,
                )
        curves[name] = own
        console.print(comparison_table(name, own))
        others = {BEFORE: own[BEFORE], OWN: own[OWN]}
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


# ------------------------------------------------------------------------------------------------ parts


def _fit(
    stage: Stage, file: Path, phases: Sequence[str], console: Console, overrides: Sequence[str] | None = None
) -> int:
    """A run as a chain runs it: in a process of its own, kept when it is finished, gone on with when it is not."""
    row = _Run(file, stage.scale, list(stage.overrides if overrides is None else overrides))
    row.start = stage.start if file == stage.file else ""
    seed = int(row.config.get("seed_everything") or 0)
    job = Job(row, seed)
    done = job.folder / "row.json"
    if done.is_file() and json.loads(done.read_text())["fingerprint"] == row.fingerprint:
        console.print(f"{file.stem}: finished before, kept", highlight=False)
        return 0
    job.prepare()
    with children.note_stops() as note:
        for phase in phases:
            console.print(f"{file.stem}: {phase}, log in {job.log}", highlight=False)
            job.start(phase, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
            assert job.process is not None
            try:
                while job.process.poll() is None and not note.seen:
                    time.sleep(children.POLL_S)
            finally:
                children.end([job.process], note, console)
            if note.seen:
                return children.exit_status(note, console)
            if job.process.returncode != 0:
                report_failure(job, console)
                return EXIT_UNFINISHED if job.was_stopped else 1
    job.finish()
    return 0


@dataclass
class _Run(Row):
    """A run in the folder that `step3vl fit` and a chain put it in."""

    start: str = ""

    def run_folder(self, seed: int) -> Path:
        return table_folder(self.file.parent, self.scale) / self.file.stem


def _build(stage: Stage, pool: Path, cases: Cases, answering: Answering, key: dict[str, Any]) -> Built:
    num = int(stage.composed.vars.get("num_messages", 24))
    old = pool.with_suffix(".asked.json")
    if pool.is_file() and (not old.is_file() or json.loads(old.read_text()) != key):
        aside = pool.with_name(f"{pool.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        pool.rename(aside)
        Console().print(f"{pool} is of another model or sampling; it is kept in {aside}", highlight=False)
    pool.parent.mkdir(parents=True, exist_ok=True)
    old.write_text(json.dumps(key) + "\n")
    with answering.numbers:
        return build_pool(
            pool,
            cases,
            answering.generator,
            stage.sampling,
            key["model"],
            num,
            max(1, 4 * stage.batch // num),
        )


def _key(stage: Stage, name: str, source: PoolSource) -> dict[str, Any]:
    """All that decides about the messages of a pool."""
    return {
        "model": model_hash(Path(stage.start)),
        "sampling": asdict(stage.sampling) | {"stop": list(stage.sampling.stop)},
        "num_messages": int(stage.composed.vars.get("num_messages", 24)),
        "shards": source.shards,
        "num_problems": source.num_problems,
        "data_root": str(stage.composed.vars.get("data_root", ".")),
        "held_out": stage.composed.config.get("suite", {}).get(name),
    }


def _held_out(stage: Stage, source: PoolSource) -> Path:
    return stage.pools / f"held-out-{source.pool}"


def _banded(problems: Sequence[PooledProblem], source: PoolSource) -> Iterator[PooledProblem]:
    return in_band(problems, fraction(source.low), fraction(source.high))


def _context(stage: Stage) -> int:
    data = stage.composed.config["data"]["init_args"]
    return int(data["max_prompt_tokens"]) + stage.sampling.max_new_tokens


def run(args: Sequence[str]) -> int:
    """`step3vl pacore train FILE [--scale S] [--a.b=c ...]`."""
    parser = argparse.ArgumentParser(prog="step3vl pacore train")
    parser.add_argument("file", type=Path, help="a stage whose data are pools: experiments/step3vl_10b/7_pacore.yaml")
    parser.add_argument("--scale", default="paper", help="paper (default), tiny")
    options, rest = parser.parse_known_args(args)
    if wrong := [word for word in rest if not word.startswith("--") or "=" not in word]:
        raise ConfigError(f"{wrong[0]!r} is no override; write --key=value")
    return train(options.file, options.scale, [word[2:] for word in rest])
