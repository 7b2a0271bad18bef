"""A table as a SLURM job array: one element for each row and seed that is not finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from step3vl.lightning_cli import Command
from step3vl.slurm.check import check_sizes
from step3vl.slurm.command import check_run, hand_over, notes, num_workers
from step3vl.slurm.request import Request
from step3vl.slurm.script import SRUN, array_script, step3vl_command

from .rows import table_folder
from .run import table_jobs


def submit_table(
    folder: Path,
    scale: str,
    seeds: Sequence[int],
    request: Request,
    is_submitted: bool,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    num_jobs: int | None = None,
) -> int:
    """Print or submit the array; finished runs are left out, and an element sets a stale run aside when it starts.

    Args:
        num_jobs: elements that run at a time; None: as many as SLURM lets.
    """
    jobs, waiting = table_jobs(folder, scale, seeds, overrides, only)
    print(f"{len(jobs)} runs: {len(jobs) - len(waiting)} finished, {len(waiting)} to do", file=sys.stderr)
    if not waiting:
        return 0
    for job in waiting:
        check_sizes(job.row.config, request, str(job.row.file))
    for file in dict.fromkeys(str(job.row.file) for job in waiting):
        check_run(Command("fit", [file], list(overrides), scale))
    for note in dict.fromkeys(note for job in waiting for note in notes(job.row.config, request)):
        print(f"note: {note}", file=sys.stderr)
    own = [f"--{text}" for text in overrides]
    commands = []
    for job in waiting:
        words = ["ablate", "run", str(folder), "--scale", scale, "--only", job.row.file.stem, "--seed", str(job.seed)]
        commands.append(step3vl_command(*words, "--launcher", SRUN, *own))
    logs = (table_folder(folder, scale) / "slurm").absolute()
    workers = max(num_workers(job.row.config) for job in waiting)
    hand_over(array_script(request, folder.name, logs, commands, workers, num_jobs), logs, is_submitted)
    return 0
