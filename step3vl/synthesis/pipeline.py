"""`step3vl pacore train`: a synthesis stage from its pools to its curve, in order, each part kept once it is there.

A warm start where the stage names one; pools of the starting checkpoint's messages; the stage's own fit and test; and
accuracy against rollouts on held-out problems of the same band, before and after (`measure`). Parts can be
called alone, so that a chain of stages runs them around its own fit.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from step3vl.ablation import children
from step3vl.ablation.rows import Row, table_folder
from step3vl.ablation.run import Job, report_failure
from step3vl.answering import Answering, open_answering
from step3vl.config import ConfigError
from step3vl.data.shards import find_shards
from step3vl.evaluate import model_hash
from step3vl.pacore.pool import Built, Cases, build_pool
from step3vl.pacore.pool_data import PoolSource
from step3vl.pacore.references import known_samples, write_known, write_references
from step3vl.pacore.template import SynthesisTemplate
from step3vl.signals import EXIT_UNFINISHED

from .curve import measure
from .stage import Stage

SHORT_LIST = 10
"""Most messages of the lists that copying is learnt from."""
SAMPLES = {"short": 15_000, "known": 5_000, "long": 5_000, "rivals": 5_000}
"""Problems of the warm start, by kind; copying is not learnt from the same few."""


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
    """The supervised stages beside the file that `vars.warm_start` names, on lists that are written first.

    Nothing where it names none.
    """
    vars_ = stage.composed.vars
    if not vars_.get("warm_start"):
        return 0
    folder = stage.pools / "references"
    if not folder.is_dir():
        part = folder.with_name("references.part")
        most = stage.composed.config["data"]["init_args"]["most_messages"]
        template, root = SynthesisTemplate(stage.template), Path(vars_.get("data_root", "."))
        questions = [f"Read row {row}." for row in range(1, 5)]
        known = [one for pattern in vars_["warm_start_known"] for one in known_samples(str(root / pattern), 1500)]
        write_references(part, "short", template, questions, SAMPLES["short"], SHORT_LIST)
        write_known(part, "known", template, known, SAMPLES["known"], most)
        write_references(part, "long", template, questions, SAMPLES["long"], most, seed=1, rivals=True)
        write_known(part, "rivals", template, known, SAMPLES["rivals"], most, seed=1, rivals=True)
        part.rename(folder)
    own = [word for word in stage.overrides if word.startswith(("vars.runs=", "vars.data_root="))]
    own.append(f"vars.references={folder.resolve()}")
    for name in vars_["warm_start"]:
        if status := _fit(stage, stage.file.with_name(f"{name}.yaml"), ("fit",), console, own):
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
            wanted[stage.held_out(source)] = lambda n=name, b=benchmark: Cases.of_benchmark(n, b)  # type: ignore[misc]
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


def run(args: Sequence[str]) -> int:
    """`step3vl pacore train FILE [--scale S] [--a.b=c ...]`."""
    parser = argparse.ArgumentParser(prog="step3vl pacore train")
    parser.add_argument("file", type=Path, help="a stage whose data are pools: experiments/step3vl_10b/7_pacore.yaml")
    parser.add_argument("--scale", default="paper", help="paper (default), tiny")
    options, rest = parser.parse_known_args(args)
    if wrong := [word for word in rest if not word.startswith("--") or "=" not in word]:
        raise ConfigError(f"{wrong[0]!r} is no override; write --key=value")
    return train(options.file, options.scale, [word[2:] for word in rest])
