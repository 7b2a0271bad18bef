"""`step3vl eval`: a model on a suite of benchmarks; every number with what is needed to doubt and to repeat it."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from step3vl.answering import Answering, Preset, add_model, add_preset, is_server, open_answering, read_preset
from step3vl.config import CONFIGS, ConfigError, compose, nearest
from step3vl.diagnose import check_classes, check_types
from step3vl.evaluation import Benchmark, Case, KeptAnswers, Record, evaluate
from step3vl.evaluation.answers import prompt_hash
from step3vl.evaluation.gallery import write_gallery
from step3vl.evaluation.report import write_report
from step3vl.pacore.measures import coordination, find_cases
from step3vl.types import Generator
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
        if options.mode == "pacore" or options.rounds or options.preset == "pacore":
            raise ConfigError("--harness lmms asks the model itself; PaCoRe is measured by this harness")
        return _run_lmms(options)
    if options.tasks:
        raise ConfigError("--tasks is for --harness lmms; here benchmarks are chosen by --suite and --only")
    suite = read_suite(options.suite, options.data_root, options.only, options.scale)
    preset, start_s = read_preset(options), time.monotonic()
    out = options.out or default_out(options.checkpoint, preset.label)
    answering = open_answering(options.checkpoint, options.model, options.batch)
    is_served = is_server(options.checkpoint)
    model = f"{options.checkpoint} {options.model}" if is_served else model_hash(Path(options.checkpoint))
    with answering.numbers:
        records, cases, hashes = answer(suite, answering, preset, out, model, options)
    facts = {
        "command": "step3vl eval " + " ".join(args),
        "label": (options.model if is_served else Path(options.checkpoint).name) + preset.label,
        "checkpoint": options.checkpoint,
        "model_hash": model,
        "suite": options.suite,
        "scale": options.scale,
        "limit": options.limit,
        "mode": preset.mode,
        "preset": preset.name,
        "sampling": asdict(preset.sampling),
        **(answering.coordinated(preset).facts if preset.mode == "pacore" else {}),
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
    answering: Answering,
    preset: Preset,
    out: Path,
    model: str,
    options: argparse.Namespace,
) -> tuple[list[Record], dict[str, list[Case]], dict[str, str]]:
    """Ask every benchmark's cases. Returns the answers, and by benchmark the cases without images and their hash.

    Coordinated answers leave their traces in `out`/traces, and what these say in `out`/pacore.json.
    """
    console, start_s = Console(), time.monotonic()
    records: list[Record] = []
    cases: dict[str, list[Case]] = {}
    hashes: dict[str, str] = {}
    measures: dict[str, Any] = {}
    for name, benchmark in suite.items():
        generator: Generator = answering.generator
        key, cases_per_call = model, 4 * options.batch
        trace = out / "traces" / f"{name}.jsonl"
        if preset.rounds is not None:
            generator = pacore = answering.coordinated(preset, trace=trace)
            key, cases_per_call = f"{model} {pacore.name}", max(1, cases_per_call // max(pacore.widths))
        kept = KeptAnswers(generator, out / "answers" / f"{name}.jsonl", key)
        asked: list[Case] = []
        by_prompt: dict[str, Case] = {}
        seen = hashlib.sha256()

        def note(
            num: int,
            chunk: list[Case],
            name: str = name,
            asked: list[Case] = asked,
            by_prompt: dict[str, Case] = by_prompt,
            seen: Any = seen,
        ) -> None:
            for case in chunk:
                prompt = prompt_hash(case.prompt)
                seen.update(f"{case.id} {case.answer} {prompt}".encode())
                asked.append(case.without_images())
                by_prompt[prompt] = asked[-1]
            console.print(f"{name}: {num} cases, {time.monotonic() - start_s:.0f} s", highlight=False)

        blind, limit = not options.no_blind, options.limit
        records += evaluate(name, benchmark, kept, preset.sampling, options.samples, limit, blind, cases_per_call, note)
        cases[name], hashes[name] = asked, seen.hexdigest()[:16]
        if kept.num_kept:
            console.print(f"{name}: {kept.num_kept} of the answers were kept from before", highlight=False)
        if preset.rounds is not None and trace.is_file():
            measures[name] = asdict(coordination(find_cases(trace, by_prompt), benchmark))
    if preset.rounds is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "pacore.json").write_text(json.dumps(measures, indent=2) + "\n")
        print_coordination(measures)
    return records, cases, hashes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step3vl eval")
    add_model(parser)
    add_preset(parser, "greedy", with_mode=True)
    add_suite(parser, default="report")
    parser.add_argument(
        "--samples", type=int, default=1, help="answers a case: pass@1 is their mean, with maj@k and cov@k"
    )
    parser.add_argument("--no-blind", action="store_true", help="do not ask again with images masked")
    parser.add_argument("--harness", default=HARNESS, choices=[HARNESS, "lmms"], help="whose prompts and scorers")
    parser.add_argument("--tasks", default="", help="with --harness lmms: its tasks, separated by commas")
    parser.add_argument("--out", type=Path, default=None, help="folder of results; default: evals/CHECKPOINT")
    return parser


def add_suite(parser: argparse.ArgumentParser, default: str | None = None, required: bool = False) -> None:
    """Which cases."""
    parser.add_argument(
        "--suite",
        default=default,
        required=required,
        help="card in configs/suite, or a file: report, ablations" + (f"; default: {default}" if default else ""),
    )
    parser.add_argument(
        "--data-root", "--data_root", default="benchmarks_data", help="folder with copies of the datasets"
    )
    parser.add_argument("--only", default="", help="benchmarks of the suite, separated by commas")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many cases of each benchmark")


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


def default_out(checkpoint: str, label: str = "") -> Path:
    """evals/CHECKPOINT, or evals/CHECKPOINT-pacore-16."""
    parts = [part for part in checkpoint.replace("://", "/").split("/") if part not in ("", ".", "..")]
    folder = Path("evals", *parts)
    return folder.with_name(folder.name + label)


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


def print_coordination(measures: dict[str, Any]) -> None:
    """One row a benchmark: what its rounds were worth and what they cost."""
    table = Table(title="Coordination: messages the last round saw, and what it made of them")
    names = ["benchmark", "message", "some right", "final", "all wrong, final right", "all right, final right"]
    for name in [*names, "cross-checks", "tokens", "s", "failed", "dropped"]:
        table.add_column(name, justify="left" if name == "benchmark" else "right")
    for name, m in measures.items():
        shares = [
            "" if m[share] is None else f"{m[share]:.3f} of {m[num]}"
            for share, num in (("emergent", "num_all_wrong"), ("kept", "num_all_right"))
        ]
        table.add_row(
            name,
            *(f"{m[key]:.3f}" for key in ("messages", "covered", "final")),
            *shares,
            f"{m['cross_checks']:.1f}",
            f"{m['num_tokens']:,.0f}",
            f"{m['seconds']:.1f}",
            str(m["num_failed"]),
            str(m["num_dropped"]),
        )
    Console().print(table)
