"""`step3vl eval`: a model on a suite of benchmarks; every number with what is needed to doubt and to repeat it."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from step3vl.ask import fast_numbers, load_model
from step3vl.config import CONFIGS, ConfigError, compose, nearest
from step3vl.diagnose import check_classes, check_types
from step3vl.evaluation import Benchmark, Case, KeptAnswers, Record, evaluate
from step3vl.evaluation.answers import prompt_hash
from step3vl.evaluation.gallery import write_gallery
from step3vl.evaluation.report import write_report
from step3vl.generation.client import ChatClient
from step3vl.generation.sampler import Sampler
from step3vl.types import Generator, Sampling
from step3vl.weights.manifest import digest, read_manifest
from step3vl.weights.runs import choose, folder_of, is_checkpoint, saved_steps

HARNESS = "step3vl"


def run(args: Sequence[str]) -> int:
    """The verb. Mistakes are ValueErrors with one sentence."""
    options = _parser().parse_args(args)
    for name in ("samples", "limit", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; accepted is 1 or more")
    if options.harness == "lmms":
        return _run_lmms(options)
    if options.tasks:
        raise ConfigError("--tasks is for --harness lmms; here benchmarks are chosen by --suite and --only")
    suite = read_suite(options.suite, options.data_root, options.only, options.scale)
    sampling, start_s = read_sampling(options), time.monotonic()
    out = options.out or default_out(options.checkpoint)
    generator, numbers = open_generator(options)
    is_served = is_server(options.checkpoint)
    model = f"{options.checkpoint} {options.model}" if is_served else model_hash(Path(options.checkpoint))
    with numbers:
        records, cases, hashes = answer(suite, generator, sampling, out / "answers", model, options)
    facts = {
        "command": "step3vl eval " + " ".join(args),
        "label": options.model if is_served else Path(options.checkpoint).name,
        "checkpoint": options.checkpoint,
        "model_hash": model,
        "suite": options.suite,
        "scale": options.scale,
        "limit": options.limit,
        "preset": options.preset,
        "sampling": asdict(sampling),
        "harness": HARNESS,
        "data_hashes": hashes,
        "seconds": round(time.monotonic() - start_s, 1),
    }
    metrics = write_report(out, suite, records, facts, cases)
    print_scores(metrics)
    failed = sum(record.error is not None for record in records)
    if failed:
        print(f"{failed} questions got no answer, and count as wrong; the same command asks them again")
    page = write_gallery(out / "report.html", suite, records, metrics)
    print(f"wrote {out / 'metrics.json'}, {out / 'cases.jsonl'}, {page}")
    return 0


def answer(
    suite: dict[str, Benchmark],
    generator: Generator,
    sampling: Sampling,
    folder: Path,
    model: str,
    options: argparse.Namespace,
) -> tuple[list[Record], dict[str, list[Case]], dict[str, str]]:
    """Ask every benchmark's cases. Returns the answers, and by benchmark the cases without images and their hash."""
    console, start_s = Console(), time.monotonic()
    records: list[Record] = []
    cases: dict[str, list[Case]] = {}
    hashes: dict[str, str] = {}
    for name, benchmark in suite.items():
        kept = KeptAnswers(generator, folder / f"{name}.jsonl", model)
        asked: list[Case] = []
        seen = hashlib.sha256()

        def note(num: int, chunk: list[Case], name: str = name, asked: list[Case] = asked, seen: Any = seen) -> None:
            for case in chunk:
                seen.update(f"{case.id} {case.answer} {prompt_hash(case.prompt)}".encode())
                asked.append(case.without_images())
            console.print(f"{name}: {num} cases, {time.monotonic() - start_s:.0f} s", highlight=False)

        blind, limit = not options.no_blind, options.limit
        records += evaluate(name, benchmark, kept, sampling, options.samples, limit, blind, 4 * options.batch, note)
        cases[name], hashes[name] = asked, seen.hexdigest()[:16]
        if kept.num_kept:
            console.print(f"{name}: {kept.num_kept} of the answers were kept from before", highlight=False)
    return records, cases, hashes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step3vl eval")
    parser.add_argument(
        "checkpoint", help="a run (runs/...), an imported, exported or released folder, or a server's URL"
    )
    parser.add_argument("--model", default="", help="of a server: the name that it knows the model by")
    parser.add_argument(
        "--suite", default="report", help="card in configs/suite, or a file: report (default), ablations"
    )
    parser.add_argument(
        "--data-root", "--data_root", default="benchmarks_data", help="folder with copies of the datasets"
    )
    parser.add_argument("--only", default="", help="benchmarks of the suite, separated by commas")
    parser.add_argument("--preset", default="greedy", help="card in configs/sampling: greedy (default), sere")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="longest answer; default: the preset's")
    parser.add_argument("--temperature", type=float, default=None, help="default: the preset's")
    parser.add_argument("--seed", type=int, default=None, help="of sampled answers; default: the preset's")
    parser.add_argument(
        "--samples", type=int, default=1, help="answers a case: pass@1 is their mean, with maj@k and cov@k"
    )
    parser.add_argument("--limit", type=int, default=None, help="only the first so many cases of each benchmark")
    parser.add_argument("--batch", type=int, default=16, help="sequences in flight at once")
    parser.add_argument("--no-blind", action="store_true", help="do not ask again with images masked")
    parser.add_argument("--scale", default="paper", help="of the preset: paper (default), tiny")
    parser.add_argument("--harness", default=HARNESS, choices=[HARNESS, "lmms"], help="whose prompts and scorers")
    parser.add_argument("--tasks", default="", help="with --harness lmms: its tasks, separated by commas")
    parser.add_argument("--out", type=Path, default=None, help="folder of results; default: evals/CHECKPOINT")
    return parser


def _run_lmms(options: argparse.Namespace) -> int:
    """The same model under lmms-eval, on copies of its datasets."""
    from step3vl.harness.lmms_command import evaluate_with_lmms

    tasks = [word.strip() for word in options.tasks.split(",") if word.strip()]
    if not tasks:
        raise ConfigError("--harness lmms needs --tasks, e.g. --tasks mmstar,ocrbench")
    found = evaluate_with_lmms(
        Path(options.checkpoint), tasks, Path(options.data_root), options.limit, options.batch, options.max_new_tokens
    )
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float | int) and "stderr" not in name:
                print(f"{task}  {name.split(',')[0]}  {value:.4f}")
    out = options.out or default_out(options.checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    (out / "lmms_eval.json").write_text(
        json.dumps({"results": found["results"], "versions": found["versions"]}, default=str)
    )
    print(f"wrote {out / 'lmms_eval.json'}")
    return 0


def is_server(checkpoint: str) -> bool:
    return checkpoint.startswith(("http://", "https://"))


def default_out(checkpoint: str) -> Path:
    """evals/CHECKPOINT."""
    return Path("evals", *[part for part in checkpoint.replace("://", "/").split("/") if part not in ("", ".", "..")])


def open_generator(options: argparse.Namespace) -> tuple[Generator, AbstractContextManager]:
    """Who answers, and the arithmetic to answer in."""
    if is_server(options.checkpoint):
        if not options.model:
            raise ConfigError("a server needs --model, the name that it knows the model by")
        return ChatClient(options.checkpoint, options.model, max_concurrent=4 * options.batch), nullcontext()
    vlm, processor = load_model(options.checkpoint)
    return Sampler(vlm, processor, batch_size=options.batch), fast_numbers(vlm)


def read_suite(name: str, data_root: str, only: str = "", scale: str | None = None) -> dict[str, Benchmark]:
    """The benchmarks of a suite's card or file, or those of them that are named."""
    file = name if name.endswith(".yaml") else f"suite/{name}.yaml"
    if not name.endswith(".yaml") and not (CONFIGS / file).is_file():
        known = sorted(path.stem for path in (CONFIGS / "suite").glob("*.yaml"))
        raise ConfigError(f"there is no suite {name!r}; {nearest(name, known)}")
    config = compose([file], [f"vars.data_root={data_root}", f"vars.corpus={data_root}"], scale).config
    chosen: list[str] = [word.strip() for word in only.split(",") if word.strip()] or list(config)
    for word in chosen:
        if word not in config:
            raise ConfigError(f"--only: the suite has no benchmark {word!r}; {nearest(word, list(config))}")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    cards = {word: config[word] for word in chosen}
    parser.add_argument("--suite", type=dict[str, Benchmark])
    check_classes(cards, "suite")
    check_types(cards, dict[str, Benchmark], "suite")
    return parser.instantiate_classes(parser.parse_object({"suite": cards})).suite


def read_sampling(options: argparse.Namespace) -> Sampling:
    """A preset with what the command line changes."""
    known = sorted(path.stem for path in (CONFIGS / "sampling").glob("*.yaml"))
    if options.preset not in known:
        raise ConfigError(f"there is no preset {options.preset!r}; {nearest(options.preset, known)}")
    values = compose([f"sampling/{options.preset}.yaml"], scale=options.scale).config
    changed = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    return Sampling(**{**values, **{key: value for key, value in changed.items() if value is not None}})


def model_hash(path: Path) -> str:
    """Names the weights: of a run, its newest checkpoint's checksums; of a folder, those of its files."""
    if is_checkpoint(path) or saved_steps(folder_of(path)):
        entries = read_manifest(choose(path))["files"]
        found = [f"{name} {entries[name]['xxh3_128']}" for name in entries if name.endswith(".safetensors")]
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        kinds = (".safetensors", ".json", ".pt", ".bin", ".ckpt")
        found = [f"{file.name} {digest(file)['xxh3_128']}" for file in files if file.is_file() and file.suffix in kinds]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:32]


def print_scores(metrics: dict[str, Any]) -> None:
    """One row a benchmark: its own number, mean and interval, baselines, what could not be read or was cut."""
    facts = metrics["provenance"]
    sampled = any(score["num_samples"] > 1 for score in metrics["scores"].values())
    title = f"{facts['label']}, {facts['preset']}, {facts['sampling']['max_new_tokens']:,} tokens, harness {HARNESS}"
    table = Table(title=title)
    names = ["benchmark", "score", "mean", "95 % interval", "blind", "majority", "cases", "unread", "cut", "tokens"]
    for name in names[:4] + (["maj@k", "cov@k"] if sampled else []) + names[4:]:
        table.add_column(name, justify="left" if name == "benchmark" else "right")
    for name, s in metrics["scores"].items():
        votes = [f"{s['voted']:.3f}", f"{s['covered']:.3f}"] if s["voted"] is not None else ["", ""]
        table.add_row(
            name,
            f"{s['headline']:.3f}",
            f"{s['score']:.3f}",
            f"{s['low']:.3f}..{s['high']:.3f}",
            *(votes if sampled else []),
            f"{s['blind']:.3f}",
            f"{s['majority']:.3f}",
            str(s["num_cases"]),
            f"{s['unreadable_rate']:.1%}",
            f"{s['truncated_rate']:.1%}",
            f"{s['num_tokens']:.0f}",
        )
    Console().print(table)
