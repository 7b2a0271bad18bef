"""The verb `ablate`: tables listed, tuned, run, drawn, reported and compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from step3vl.config import ConfigError
from step3vl.slurm.request import add_options, read_request

from .rows import print_diff, print_tables
from .run import run_table
from .table import print_table
from .tune import tune_table


def run(args: Sequence[str]) -> int:
    """`step3vl ablate VERB ...`; `args` without `ablate`. Mistakes are ValueErrors with one sentence."""
    parser = argparse.ArgumentParser(prog="step3vl ablate")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="tables, their rows, what is finished")
    listing.add_argument("--root", type=Path, default=Path("ablations"), help="folder of tables")
    listing.add_argument("--scale", default="tiny", help="which runs count as finished")
    run_verb = verbs.add_parser("run", help="train and score every row and seed; finished ones are kept")
    run_verb.add_argument("folder", type=Path, help="a table: a folder with one YAML a row")
    run_verb.add_argument("--scale", default="paper", help="paper or tiny")
    run_verb.add_argument("--seeds", type=int, default=1, help="seeds 0..N-1 a row")
    run_verb.add_argument("--seed", type=int, default=None, help="this seed alone")
    run_verb.add_argument("--only", action="append", default=[], metavar="ROW", help="this row alone (repeatable)")
    run_verb.add_argument("--launcher", default="", help='starts a run on all GPUs of a job, e.g. "srun"')
    run_verb.add_argument("--slurm", action="store_true", help="as a job array; the options below are its own")
    add_options(run_verb, required=False)
    run_verb.add_argument(
        "-j", "--jobs", type=int, default=None, help="rows at a time (default: CPU cores, or 1 with a GPU)"
    )
    table = verbs.add_parser("table", help="our table beside the paper's; writes CSV, Markdown, PNG")
    table.add_argument("folder", type=Path)
    table.add_argument("--scale", default="tiny", help="paper or tiny")
    report = verbs.add_parser("report", help="a page of intervals, claims and verdicts, written from the runs")
    report.add_argument("folder", type=Path)
    report.add_argument("--scale", default="tiny", help="paper or tiny")
    report.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the page and its picture")
    tune = verbs.add_parser("tune", help="the learning rates of the table's grid, a short run each")
    tune.add_argument("folder", type=Path)
    tune.add_argument("--scale", default="paper", help="paper or tiny")
    tune.add_argument("--steps", type=int, required=True, help="optimizer steps of a run")
    tune.add_argument("--only", action="append", default=[], metavar="ROW", help="this row alone (repeatable)")
    tune.add_argument("-j", "--jobs", type=int, default=None, help="runs at a time, as of ablate run")
    diff = verbs.add_parser("diff", help="only the keys that differ")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.add_argument("--scale", default="paper", help="paper or tiny")
    options, overrides = parser.parse_known_args(args)
    bad = [word for word in overrides if not (word.startswith("--") and "=" in word)]
    if bad or (overrides and options.verb != "run"):
        raise ConfigError(
            f"ablate {options.verb}: unknown argument {(bad or overrides)[0]!r}; overrides are --KEY=VALUE"
        )
    match options.verb:
        case "list":
            print_tables(options.root, options.scale)
        case "run":
            return _run(options, overrides)
        case "table":
            print_table(options.folder, options.scale)
        case "report":
            from .report import write_page

            write_page(options.folder, options.scale, options.out)
        case "tune":
            return tune_table(options.folder, options.scale, options.steps, options.jobs, options.only)
        case "diff":
            print_diff(options.a, options.b, options.scale)
    return 0


def _run(options: argparse.Namespace, words: list[str]) -> int:
    seeds = range(options.seeds) if options.seed is None else [options.seed]
    if options.slurm:
        from .array import submit_table  # types every row, for which it needs Lightning

        request, keys = read_request(options, words)
        return submit_table(
            options.folder, options.scale, seeds, request, options.submit, keys, options.only, options.jobs
        )
    if options.submit or options.dry_run:
        raise ConfigError("ablate run: --submit and --dry-run go with --slurm")
    keys = [word[2:] for word in words]
    return run_table(options.folder, options.scale, seeds, options.jobs, keys, options.only, options.launcher)
