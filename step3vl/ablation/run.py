"""Run a table: every row and seed in a process of its own, a few at a time, finished ones kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from .rows import Row, read_rows

LINE_EVERY_S = 30.0


@dataclass
class Job:
    """One row with one seed: train, then test."""

    row: Row
    seed: int
    process: subprocess.Popen | None = None
    phase: str = "fit"

    @property
    def name(self) -> str:
        return f"{self.row.file.stem} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.row.run_folder(self.seed)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, phase: str, num_threads: int) -> None:
        """Begin `fit` or `test` in a child process; both continue from the last checkpoint if there is one."""
        self.phase = phase
        last = self.folder / "checkpoints" / "last.ckpt"
        own = [f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder}"]
        own += [f"--ckpt_path={last}"] if last.exists() else []
        command = [sys.executable, "-m", "step3vl", phase, "-c", str(self.row.file), "--scale", self.row.scale]
        command += [f"--{text}" for text in self.row.overrides] + own
        env = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "COLUMNS": "140"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

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


def run_table(
    folder: Path, scale: str, num_seeds: int, num_jobs: int | None = None, overrides: Sequence[str] = ()
) -> int:
    """Train and score every row of `folder` with seeds 0..num_seeds-1. Returns 0 when all finished, else 1."""
    if num_seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {num_seeds}")
    console = Console()
    rows = read_rows(folder, scale, overrides)
    jobs = [Job(row, seed) for seed in range(num_seeds) for row in rows]
    waiting = [job for job in jobs if job.row.metrics(job.seed) is None]
    num_cores = os.cpu_count() or 1
    num_jobs = num_jobs or (1 if torch.cuda.is_available() else num_cores)
    num_jobs = max(1, min(num_jobs, len(waiting)))
    num_threads = max(1, num_cores // num_jobs)
    console.print(f"{len(jobs)} runs: {len(jobs) - len(waiting)} finished, {len(waiting)} to do, {num_jobs} at a time")
    running: list[Job] = []
    failed: list[Job] = []
    last_s = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                job = waiting.pop(0)
                job.prepare()
                job.start("fit", num_threads)
                running.append(job)
                console.print(f"{job.name}: training, log in {job.log}")
            time.sleep(0.2)
            for job in [job for job in running if job.process and job.process.poll() is not None]:
                _advance(job, num_threads, running, failed, console)
            if time.monotonic() - last_s > LINE_EVERY_S:
                last_s = time.monotonic()
                for job in running:
                    console.print(f"{job.name}: {job.last_line()}", markup=False, highlight=False)
    finally:
        for job in running:
            if job.process and job.process.poll() is None:
                job.process.terminate()
    for job in failed:
        tail = job.log.read_text(errors="replace").splitlines()[-5:]
        console.print(f"{job.name} failed in {job.phase}; the end of {job.log}:", style="red")
        console.print("\n".join(tail), markup=False, highlight=False)
    return 1 if failed else 0


def _advance(job: Job, num_threads: int, running: list[Job], failed: list[Job], console: Console) -> None:
    """A child ended: go on to the test, finish, or record the failure."""
    assert job.process is not None
    if job.process.returncode != 0:
        running.remove(job)
        failed.append(job)
    elif job.phase == "fit":
        job.start("test", num_threads)
        console.print(f"{job.name}: trained; {job.last_line('step ')}", markup=False, highlight=False)
    else:
        running.remove(job)
        job.finish()
        scores = json.loads((job.folder / "metrics.json").read_text())["scores"]
        console.print(f"{job.name}: " + "  ".join(f"{k} {v['score']:.2f}" for k, v in scores.items()), highlight=False)
