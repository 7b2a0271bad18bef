"""The verbs `data import` and `data validate`: their arguments, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from step3vl.data.importers.build import Labels
from step3vl.data.importers.report import Report
from step3vl.data.importers.run import import_source
from step3vl.data.importers.sources import READERS, Options
from step3vl.data.validate import shards_of, validate_shards, validate_source

MAX_SENTENCES = 20


def add_verbs(verbs: Any) -> None:
    """Add `import` and `validate` to the verbs of `step3vl data`."""
    importing = verbs.add_parser(
        "import", help="LLaVA, ShareGPT, Qwen-VL JSON or Hugging Face parquet as shards (docs/data_format.md)"
    )
    importing.add_argument("source", help="file, folder of files of one kind, or a quoted pattern")
    importing.add_argument("--out", type=Path, required=True, help="folder for the shards; one folder an import")
    importing.add_argument("--domain", required=True, help="domain of every sample, such as vqa")
    importing.add_argument("--subset", default=None, help="subset of every sample (default: the source's name)")
    importing.add_argument("--level", type=int, default=0, help="level of every sample, 0 to 4")
    importing.add_argument("--source", dest="source_name", default=None, help="where the data come from, in words")
    importing.add_argument("--licence", default="unknown", help="licence of the data, an SPDX name if it has one")
    importing.add_argument("--samples_per_shard", type=int, default=1000, help="samples a shard (default 1000)")
    importing.add_argument("--overwrite", action="store_true", help="replace an earlier import in that folder")
    _add_reading(importing)
    checking = verbs.add_parser(
        "validate", help="check shards, or a source before it is imported; exit code 1 if wrong"
    )
    checking.add_argument("path", help="a shard, a folder of shards, or a source as for import")
    checking.add_argument("--all", action="store_true", help=f"every sentence, not the first {MAX_SENTENCES}")
    _add_reading(checking)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="auto", help=f"auto, {', '.join(READERS)}")
    parser.add_argument(
        "--images", type=Path, default=None, help="folder of image paths (default: the source's folder)"
    )
    parser.add_argument(
        "--map", action="append", default=[], metavar="OURS=THEIRS", help="our field from theirs, question=prompt"
    )
    parser.add_argument("--limit", type=int, default=None, help="read so many records and no more")


def run_import(options: argparse.Namespace) -> int:
    """`data import`: 0 when something was imported, 1 when nothing was. Raises ValueError for a hopeless source."""
    source = Path(options.source)
    whole = source.absolute()
    name = whole.parent.name if any(c in source.name for c in "*?[") else whole.stem
    labels = Labels(
        domain=options.domain,
        subset=options.subset if options.subset is not None else _plain(name),
        level=options.level,
        source=options.source_name if options.source_name is not None else name,
        licence=options.licence,
    )
    console = Console(highlight=False)
    with _progress("importing") as done:
        report, shards, format = import_source(
            options.source, options.out, labels, _reading(options), options.samples_per_shard, options.overwrite, done
        )
    console.print(
        f"format {format}, domain {labels.domain}, subset {labels.subset}, licence {labels.licence}", markup=False
    )
    if report.kinds:
        console.print(report.problems_table(sentences=True))
    report.print_notes(console)
    if shards:
        size = sum(shard.size_bytes for shard in shards) / 2**20
        images = _many(sum(shard.num_images for shard in shards), "image")
        print(f"{_many(len(shards), 'shard')}, {images}, {size:,.1f} MiB: {options.out}/{labels.stem}-*.tar")
    verdict = f"imported {report.num_sound:,} of {report.num_records:,} records"
    refused = f"{report.num_refused:,} refused, see {options.out}/rejected.jsonl" if report.num_refused else ""
    print("; ".join(clause for clause in (verdict, refused, *report.remarks) if clause))
    return 0 if report.num_sound else 1


def run_validate(options: argparse.Namespace) -> int:
    """`data validate`: 0 when every record is sound, 1 when something is wrong."""
    console = Console(highlight=False)
    sentences: list[str] = []

    def hear(sentence: str) -> None:
        if options.all:
            print(sentence)
        elif len(sentences) < MAX_SENTENCES:
            sentences.append(sentence)

    report = Report(sentence=hear)
    shards = shards_of(Path(options.path))
    with _progress("checking") as done:
        if shards:
            validate_shards(shards, report, done)
            verdict = f"{_many(len(shards), 'shard')}: {_many(report.num_sound, 'sample')} sound"
        else:
            format = validate_source(options.path, _reading(options), report, done)
            verdict = f"format {format}: {report.num_sound:,} of {report.num_records:,} records sound"
    for sentence in sentences:
        print(sentence)
    if report.num_refused > len(sentences) and not options.all:
        print(f"... and {report.num_refused - len(sentences):,} more; --all shows them")
    if report.kinds:
        console.print(report.problems_table(sentences=False))
    report.print_notes(console)
    wrong = [_many(report.num_refused, "problem")] if report.num_refused else []
    print("; ".join([verdict, *wrong, *report.remarks]))
    return 0 if report.num_sound and not report.num_refused else 1


def _reading(options: argparse.Namespace) -> Options:
    mapping: dict[str, str] = {}
    for word in options.map:
        ours, equals, theirs = word.partition("=")
        if not equals or not ours or not theirs:
            raise ValueError(f"--map {word}: accepted is OURS=THEIRS, for example --map question=prompt")
        if ours in mapping or theirs in mapping.values():
            raise ValueError(f"--map {word}: {ours if ours in mapping else theirs!r} is already in another --map")
        mapping[ours] = theirs
    return Options(format=options.format, images=options.images, mapping=mapping, limit=options.limit)


def _many(num: int, name: str) -> str:
    return f"{num:,} {name}{'s' * (num != 1)}"


def _plain(name: str) -> str:
    plain = "".join(c if (c.isalnum() and c.isascii()) or c in "_.-" else "_" for c in name)[:80].lstrip("_.-")
    return plain or "imported"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, when that is a terminal; yields what hears the share that is done."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
