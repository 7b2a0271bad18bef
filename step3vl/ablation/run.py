"""Run a table: every row and seed in a process of its own, a few at a time, finished ones kept."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from step3vl.config import ConfigError, nearest
from step3vl.signals import EXIT_UNFINISHED

from . import children
from .rows import Row, read_rows

LINE_EVERY_S = 30.0


@dataclass
class Job:
    """One row with one seed: train, then test; or train alone, when `last_phase` is "fit"."""

    row: Row
    seed: int
    process: subprocess.Popen | None = None
    phase: str = "fit"
    last_phase: str = "test"

    @property
    def name(self) -> str:
        return (
            f"{self.row.file.stem} seed {self.seed}"
            if self.last_phase == "test"
            else f"{self.folder.parent.name} {self.folder.name}"
        )

    @property
    def folder(self) -> Path:
        return self.row.run_folder(self.seed)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, phase: str, num_threads: int, launcher: str = "") -> None:
        """Begin `fit` or `test` in a child process; both continue from the last checkpoint if there is one.

        `launcher` is what starts it on all nodes and GPUs of a job ("srun"); empty: it is started here.
        """
        self.phase = phase
        own = [f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder}", "--ckpt_path=last"]
        command = [*shlex.split(launcher), sys.executable, "-m", "step3vl", phase]
        command += ["-c", str(self.row.file), "--scale", self.row.scale]
        command += [f"--{text}" for text in self.row.overrides] + own
        env = {**os.environ, "COLUMNS": "140"} if launcher else children.local_env(num_threads)
        self.process = children.start(command, self.log, env)

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended it after it had saved."""
        return self.process is not None and self.process.returncode == EXIT_UNFINISHED

    def prepare(self) -> None:
        """Keep what an earlier run of this configuration left; set aside what another configuration left."""
        mark = self.folder / "started.json"
        found = json.loads(mark.read_text())["fingerprint"] if mark.is_file() else None
        if found != self.row.fingerprint and (found or (self.folder / "checkpoints").is_dir()):
            aside = self.folder.with_name(f"{self.folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
            shutil.move(self.folder, aside)
            Console().print(f"{self.name}: its configuration changed since it ran; the old run is kept in {aside}")
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"fingerprint": self.row.fingerprint}) + "\n")

    @property
    def is_finished(self) -> bool:
        """Whether an earlier call has ended it, with this configuration."""
        if self.last_phase == "test":
            return self.row.metrics(self.seed) is not None
        done = self.folder / "row.json"
        return done.is_file() and json.loads(done.read_text())["fingerprint"] == self.row.fingerprint

    def take_over(self) -> Path | None:
        """Copy the finished run of this very configuration and seed from another row, if there is one; returns it."""
        if self.last_phase != "test":
            return None
        wanted = {"fingerprint": self.row.fingerprint, "seed": self.seed}
        for done in sorted(self.folder.parents[2].glob(f"*/*/{self.folder.name}/row.json")):
            if json.loads(done.read_text()) == wanted:
                shutil.copytree(done.parent, self.folder, dirs_exist_ok=True)
                return done.parent
        return None

    def finish(self) -> None:
        """Mark the run as done; only marked runs enter the table."""
        (self.folder / "row.json").write_text(
            json.dumps({"fingerprint": self.row.fingerprint, "seed": self.seed}) + "\n"
        )

    def last_line(self, start: str = "") -> str:
        lines = [
            line
            for line in self.log.read_text(errors="replace").splitlines()
            if line.strip() and line.startswith(start)
        ]
        return lines[-1].strip() if lines else ""


def table_jobs(
    folder: Path,
    scale: str,
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
) -> tuple[list[Job], list[Job]]:
    """(all jobs of a table or of the rows named in `only`, those of them that are not finished)."""
    rows = read_rows(folder, scale, overrides)
    names = [row.file.stem for row in rows]
    for name in only:
        if name not in names:
            raise ConfigError(f"{folder} has no row {name!r}; {nearest(name, names)}")
    jobs = [Job(row, seed) for seed in seeds for row in rows if not only or row.file.stem in only]
    return jobs, [job for job in jobs if not job.is_finished]


def run_table(
    folder: Path,
    scale: str,
    seeds: Sequence[int],
    num_jobs: int | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    launcher: str = "",
) -> int:
    """Train and score rows of `folder` with every seed. Returns 0 when all finished, 85 when stopped, else 1."""
    if not seeds:
        raise ValueError("--seeds must be at least 1, got 0")
    return run_jobs(table_jobs(folder, scale, seeds, overrides, only)[0], num_jobs, launcher)


def run_jobs(jobs: Sequence[Job], num_jobs: int | None = None, launcher: str = "") -> int:
    """Run what is not finished, `num_jobs` at a time. Returns 0 when all finished, 85 when stopped, else 1."""
    console = Console()
    waiting = [job for job in jobs if not job.is_finished]
    num_cores = os.cpu_count() or 1
    num_jobs = num_jobs or (1 if torch.cuda.is_available() or launcher else num_cores)
    num_jobs = max(1, min(num_jobs, len(waiting)))
    num_threads = max(1, num_cores // num_jobs)
    console.print(f"{len(jobs)} runs: {len(jobs) - len(waiting)} finished, {len(waiting)} to do, {num_jobs} at a time")
    running: list[Job] = []
    failed: list[Job] = []
    last_s = time.monotonic()
    with children.note_stops() as note:
        try:
            while (waiting or running) and not note.seen:
                while waiting and len(running) < num_jobs:
                    job = waiting.pop(0)
                    job.prepare()
                    if twin := job.take_over():
                        console.print(f"{job.name}: the same run as {twin}, which is copied", highlight=False)
                        continue
                    job.start("fit", num_threads, launcher)
                    running.append(job)
                    console.print(f"{job.name}: training, log in {job.log}")
                time.sleep(children.POLL_S)
                for job in [job for job in running if job.process and job.process.poll() is not None]:
                    _advance(job, num_threads, launcher, running, failed, console)
                if time.monotonic() - last_s > LINE_EVERY_S:
                    last_s = time.monotonic()
                    for job in running:
                        console.print(f"{job.name}: {job.last_line()}", markup=False, highlight=False)
        finally:
            children.end([job.process for job in running if job.process], note, console)
    if note.seen:
        return children.exit_status(note, console)
    for job in failed:
        report_failure(job, console)
    stopped = [job for job in failed if job.was_stopped]
    return 0 if not failed else EXIT_UNFINISHED if stopped == failed else 1


def report_failure(job: Job, console: Console) -> None:
    """Why a run did not finish: a signal, or the end of its log."""
    if job.was_stopped:
        console.print(f"{job.name} was stopped by a signal and has saved; the same command goes on", highlight=False)
        return
    console.print(f"{job.name} failed in {job.phase}; the end of {job.log}:", style="red")
    tail = job.log.read_text(errors="replace").splitlines()[-5:]
    console.print("\n".join(tail), markup=False, highlight=False)


def _advance(
    job: Job, num_threads: int, launcher: str, running: list[Job], failed: list[Job], console: Console
) -> None:
    """A child ended: go on to the test, finish, or record the failure."""
    assert job.process is not None
    if job.process.returncode != 0:
        running.remove(job)
        failed.append(job)
    elif job.phase != job.last_phase:
        job.start("test", num_threads, launcher)
        console.print(f"{job.name}: trained; {job.last_line('step ')}", markup=False, highlight=False)
    else:
        running.remove(job)
        job.finish()
        if job.phase == "fit":
            console.print(f"{job.name}: trained; {job.last_line('step ')}", markup=False, highlight=False)
            return
        scores = json.loads((job.folder / "metrics.json").read_text())["scores"]
        console.print(f"{job.name}: " + "  ".join(f"{k} {v['score']:.2f}" for k, v in scores.items()), highlight=False)
