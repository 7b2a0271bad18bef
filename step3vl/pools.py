"""`step3vl pacore pool` and `band`: messages of a model to problems of shards or benchmarks, and which to train on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from step3vl.answering import add_model, add_preset, is_server, open_answering, read_preset
from step3vl.config import ConfigError
from step3vl.evaluate import add_suite, model_hash, read_suite
from step3vl.evaluation import Benchmark
from step3vl.pacore.pool import Cases, append, build_pool, fraction, in_band, read_pool
from step3vl.pacore.released import read_released


def run_pool(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl pacore pool")
    add_model(parser, optional=True)
    add_suite(parser)
    parser.add_argument("--shards", default=None, help="instead of a suite: a folder or pattern of shards")
    parser.add_argument("--released", type=Path, default=None, help="instead: published JSON, whose responses are used")
    parser.add_argument("--num", type=int, default=24, help="messages a problem (default: 24)")
    parser.add_argument("--out", type=Path, required=True, help="the pool, a JSON-lines file; it is added to")
    add_preset(parser, "sere")
    options = parser.parse_args(args)
    if sum(value is not None for value in (options.suite, options.shards, options.released)) != 1:
        raise ConfigError("give one of --shards, --suite and --released")
    if options.released is not None:
        if options.out.exists():
            raise ConfigError(f"{options.out} exists; a published file is read into a new pool")
        problems = list(read_released(options.released))
        for problem in problems:
            append(options.out, problem)
        print(f"{len(problems)} problems in {options.out}")
        return 0
    if options.checkpoint is None:
        raise ConfigError("a pool needs a model: a folder, or a server's URL with --model")
    preset = read_preset(options)
    sources = _sources(options)
    answering = open_answering(options.checkpoint, options.model, options.batch)
    server = is_server(options.checkpoint)
    model = f"{options.checkpoint} {options.model}" if server else model_hash(Path(options.checkpoint))
    generator, num_rollouts = answering.generator, options.num
    if preset.rounds is not None:  # messages that are syntheses themselves, as the second filter of the paper judges
        generator = pacore = answering.coordinated(preset)
        model, num_rollouts = f"{model} {pacore.name}", options.num * max(pacore.widths)
    console = Console()
    num_lost = 0
    for name, cases in sources.items():
        with answering.numbers:
            built = build_pool(
                options.out,
                cases,
                generator,
                preset.sampling,
                model,
                options.num,
                max(1, 4 * options.batch // num_rollouts),
                lambda num, name=name: console.print(f"{name}: {num} problems", highlight=False),  # type: ignore[misc]
            )
        num_lost += built.num_without_any
        print(
            f"{name}: {built.num_problems} problems in {options.out}, {built.num_new} of them new; "
            f"{built.num_failed} answers failed"
        )
    if num_lost:
        print(f"{num_lost} problems got no answer at all; the same command asks them again")
    return 0


def _sources(options: argparse.Namespace) -> dict[str, Cases]:
    if options.shards is not None:
        return {options.shards: Cases.of_shards(options.shards, options.limit)}
    suite: dict[str, Benchmark] = read_suite(options.suite, options.data_root, options.only, options.scale)
    return {name: Cases.of_benchmark(name, benchmark, options.limit) for name, benchmark in suite.items()}


def run_band(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl pacore band")
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path, help="JSON-lines file to write")
    parser.add_argument("--low", default="0", help="mean message accuracy is above it (default: 0)")
    parser.add_argument("--high", default="9/24", help="and below it (default: 9/24, as for mathematics; code: 15/24)")
    options = parser.parse_args(args)
    low, high = fraction(options.low), fraction(options.high)
    if options.out.exists():
        raise ConfigError(f"{options.out} exists; a band is written to a new file")
    problems = list(read_pool(options.pool))
    kept = list(in_band(problems, low, high))
    for problem in kept:
        append(options.out, problem)
    print(
        f"{len(kept)} of {len(problems)} problems have a mean message accuracy between {options.low} and {options.high}"
    )
    return 0
