"""The verb `slurm`: one run as a job, checked before anybody waits."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step3vl.config import compose
from step3vl.lightning_cli import Command, Step3VLCLI, run_folder

from .check import check_sizes
from .request import Request, add_options, read_request
from .script import run_script, step3vl_command
from .submit import submit

EPILOG = "--a.b=VALUE overrides the run; --sbatch_KEY=VALUE is handed to sbatch, e.g. --sbatch_account=vision"


def run(args: Sequence[str]) -> int:
    """`step3vl slurm FILE --nodes N ... --dry-run | --submit`; `args` without the verb."""
    parser = argparse.ArgumentParser(prog="step3vl slurm", epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("file", help="an experiment or a row of a table")
    parser.add_argument("--scale", default="paper", help="paper or tiny")
    add_options(parser)
    options, words = parser.parse_known_args(args)
    request, overrides = read_request(options, words)
    config = compose([options.file], overrides, options.scale).config
    check_sizes(config, request, options.file)
    command = Command("fit", [options.file], overrides, options.scale)
    check_run(command)
    folder = Path(config["trainer"].get("default_root_dir") or run_folder(command))
    words = ["fit", "-c", options.file, "--scale", options.scale, *(f"--{text}" for text in overrides)]
    if not any(text.startswith("ckpt_path=") for text in overrides):
        words.append("--ckpt_path=last")
    logs = (folder / "slurm").absolute()
    script = run_script(request, folder.name, logs, step3vl_command(*words), num_workers(config))
    for note in notes(config, request):
        print(f"note: {note}", file=sys.stderr)
    hand_over(script, logs, options.submit)
    return 0


def check_run(command: Command) -> None:
    """Type every key of a run as `fit` would, and build nothing. Raises ConfigError."""
    command.print_config = True
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        Step3VLCLI(command)


def hand_over(script: str, logs: Path, is_submitted: bool) -> None:
    """Submit a script, or print it."""
    if is_submitted:
        print(f"submitted job {submit(script, logs)}; its script and logs are in {logs}")
        return
    print(script, end="")
    print(f"# before you submit it by hand: mkdir -p {logs}", file=sys.stderr)


def num_workers(config: Mapping[str, Any]) -> int:
    """Loader workers of a task."""
    return int((config["data"].get("init_args") or {}).get("num_workers") or 0)


def notes(config: Mapping[str, Any], request: Request) -> list[str]:
    """What is allowed, but worth a second look: the size of a step, and whether the run saves before its limit."""
    data, trainer = config["data"].get("init_args") or {}, config["trainer"]
    found = []
    for key, unit in (("samples_per_step", "samples"), ("rows_per_step", "rows")):
        if data.get(key):
            times = trainer.get("accumulate_grad_batches") or 1
            factors = f"{data[key]} a rank x {request.num_tasks} ranks" + (
                f" x {times} accumulated" if times > 1 else ""
            )
            found.append(f"a step is {data[key] * request.num_tasks * times:,} {unit}: {factors}")
    names = [str(c.get("class_path", "")) for c in trainer.get("callbacks") or []]
    if not any(name.endswith(".Requeue") for name in names):
        found.append("trainer.callbacks has no step3vl.callbacks.Requeue: the run is cut off at its limit")
    return found
