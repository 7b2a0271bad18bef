"""What is asked of SLURM: nodes, GPUs, time, and whatever else sbatch takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from step3vl.config import ConfigError

OWN_OPTIONS = {
    "nodes": "--nodes",
    "gpus": "--gpus",
    "gpus-per-node": "--gpus",
    "ntasks": "--gpus",
    "ntasks-per-node": "--gpus",
    "time": "--time",
    "partition": "--partition",
    "signal": "--notice",
    "array": "step3vl ablate run FOLDER --slurm",
}
"""sbatch options that are set by options of ours, because the run must agree with them."""


@dataclass
class Request:
    """What a job asks for."""

    nodes: int
    gpus: int
    """On each node, one task each; 0: one task a node and no GPU."""
    time: str
    """Limit, as sbatch takes it: minutes, H:MM:SS, D-HH:MM:SS and the like."""
    notice_s: int
    """Seconds before the limit at which every task gets SIGUSR1."""
    partition: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    """More sbatch options by name, without dashes; an empty value is a flag."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus < 0:
            raise ConfigError(f"--nodes must be at least 1 and --gpus at least 0, got {self.nodes} and {self.gpus}")
        if not 0 < self.notice_s < seconds(self.time):
            raise ConfigError(
                f"--notice is {self.notice_s} s, but must be above 0 and below --time {self.time} "
                f"({seconds(self.time)} s)"
            )
        for name in self.extra:
            if name in OWN_OPTIONS:
                raise ConfigError(f"--sbatch_{name}: use {OWN_OPTIONS[name]}, which the run is checked against")

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def num_tasks(self) -> int:
        return self.nodes * self.tasks_per_node


def seconds(time: str) -> int:
    """Seconds of a SLURM time: M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise ConfigError(f"--time {time!r} is no time of SLURM; accepted: minutes, H:MM:SS, D-HH:MM:SS, e.g. 24:00:00")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    units = [3600, 60, 1]  # D-H, D-H:MM, D-H:MM:SS, H:MM:SS
    if days is None and len(parts) < 3:  # M, M:SS
        units = [60, 1]
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))


def add_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of a request; `read_request` reads them."""
    parser.add_argument("--nodes", type=int, required=required, default=1, help="nodes")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node, one task each (default 8; 0: CPU only)")
    parser.add_argument("--time", default="24:00:00", help="limit of the job (default 24:00:00)")
    parser.add_argument("--partition", default=None, help="partition (default: the cluster's)")
    parser.add_argument(
        "--notice", type=int, default=300, help="seconds before the limit at which the run saves (default 300)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the script")
    how.add_argument("--submit", action="store_true", help="submit it (needs the extra slurm)")


def read_request(options: argparse.Namespace, words: Sequence[str]) -> tuple[Request, list[str]]:
    """The request of parsed options, and the words that are overrides of the run, without their dashes.

    Raises ConfigError for a word that is neither --sbatch_KEY=VALUE nor --a.b=VALUE, and without --dry-run or --submit.
    """
    if not (options.dry_run or options.submit):
        raise ConfigError("say --dry-run (print the script) or --submit")
    extra, overrides = {}, []
    for word in words:
        key, sep, value = word.partition("=")
        if not key.startswith("--") or not sep:
            raise ConfigError(f"{word!r} is not an option; overrides are --a.b=VALUE, sbatch's are --sbatch_KEY=VALUE")
        if key.startswith("--sbatch_"):
            extra[key.removeprefix("--sbatch_").replace("_", "-")] = value
        else:
            overrides.append(word[2:])
    request = Request(options.nodes, options.gpus, options.time, options.notice, options.partition, extra)
    return request, overrides
