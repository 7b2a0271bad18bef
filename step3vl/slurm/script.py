"""The sbatch script of a run, or of a table as a job array: everything that will happen is in its text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .request import Request

SRUN = "srun --kill-on-bad-exit=1"
NUM_EXTRA_CPUS = 2
"""A task's cores beside those of its loader workers: the training loop, and threads that talk to GPU and network."""


def run_script(request: Request, name: str, logs: Path, command: Sequence[str], num_workers: int = 0) -> str:
    """A job that runs one command on every GPU."""
    body = ["# Lightning reads ranks and addresses from SLURM's variables", f"{SRUN} {shlex.join(command)}"]
    return _script(_head(request, name, str(logs / "%j.txt"), num_workers), body)


def array_script(
    request: Request,
    name: str,
    logs: Path,
    commands: Sequence[Sequence[str]],
    num_workers: int = 0,
    num_jobs: int | None = None,
) -> str:
    """An array whose element i runs the i-th command, once and not in every task: it calls srun by itself."""
    limit = f"%{num_jobs}" if num_jobs else ""
    head = [*_head(request, name, str(logs / "%A_%a.txt"), num_workers), ("array", f"0-{len(commands) - 1}{limit}", "")]
    cases = [f"  {i}) {shlex.join(command)} ;;" for i, command in enumerate(commands)]
    body = [
        "# one element a row and seed; each starts its own tasks with srun",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *cases,
    ]
    return _script(head, [*body, "esac"])


def _head(request: Request, name: str, log: str, num_workers: int) -> list[tuple[str, str, str]]:
    """(option, value, comment) of every #SBATCH line."""
    options = [
        ("job-name", name, ""),
        ("nodes", str(request.nodes), ""),
        ("ntasks-per-node", str(request.tasks_per_node), "one task a GPU"),
        ("cpus-per-task", str(num_workers + NUM_EXTRA_CPUS), f"{num_workers} loader workers and {NUM_EXTRA_CPUS} more"),
        ("mem", "0", "all of the node's main memory, for loader workers and for gathering checkpoints"),
        ("time", request.time, ""),
        ("signal", f"USR1@{request.notice_s}", "so many seconds before the limit the run saves and is requeued"),
        ("requeue", "", "a requeued job goes on where it stopped"),
        ("open-mode", "append", "restarts write on in the same log"),
        ("output", log, ""),
    ]
    if request.gpus and not {"gres", "gpus-per-task"} & set(request.extra):
        options.insert(3, ("gpus-per-node", str(request.gpus), ""))
    if request.partition:
        options.insert(1, ("partition", request.partition, ""))
    kept = [option for option in options if option[0] not in request.extra]
    return kept + [(name, value, "") for name, value in request.extra.items()]


def _script(head: Sequence[tuple[str, str, str]], body: Sequence[str]) -> str:
    lines = ["#!/bin/bash"]
    for name, value, comment in head:
        lines += [f"# {comment}:"] if comment else []
        lines.append(f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}")
    lines += [
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"',
        "",
        *body,
    ]
    return "\n".join(lines) + "\n"


def step3vl_command(*words: str) -> list[str]:
    """A command of ours, run by this very interpreter."""
    return [sys.executable, "-u", "-m", "step3vl", *words]
