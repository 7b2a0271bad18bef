"""An import: a source's samples as shards in a folder, with an account of what was refused beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from step3vl.data.importers.build import Labels
from step3vl.data.importers.pictures import Pictures
from step3vl.data.importers.report import RejectedFile, Report
from step3vl.data.importers.sources import Options, samples, settle_format, source_files
from step3vl.data.shards import ShardInfo, write_shards

ENOUGH = 1000
"""An import of which the first so many records are all refused is stopped: the format or the folder is wrong."""


def import_source(
    source: str | Path,
    out: Path,
    labels: Labels,
    options: Options,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    done: Callable[[float], None] = lambda share: None,
) -> tuple[Report, list[ShardInfo], str]:
    """Write a source as shards into `out`, with `rejected.jsonl` for what was refused and `import.json` about it all.

    The same source and options give the same bytes. Returns the report, the shards and the format.
    Raises ValueError when the source cannot be read at all, or when `out` holds an earlier import or shards.
    """
    if samples_per_shard < 1:
        raise ValueError(f"--samples_per_shard must be at least 1, got {samples_per_shard}")
    files = source_files(source)
    format = settle_format(files, options)
    Pictures(options.images)
    _prepare(out, overwrite)
    about = out / "import.json"
    _write(about, {"version": 1, "stem": labels.stem, "finished": False})
    report = Report(rejected=RejectedFile(out / "rejected.jsonl"))
    try:
        stream = samples(files, format, options, labels, report, done, ENOUGH)
        shards = write_shards(stream, out, labels.stem, samples_per_shard)
    finally:
        if report.rejected is not None:
            report.rejected.close()
    _write(
        about,
        {
            "version": 1,
            "stem": labels.stem,
            "finished": True,
            "files": [path.name for path in files],
            "format": format,
            "mapping": dict(sorted(options.mapping.items())),
            "limit": options.limit,
            **asdict(labels),
            "num_imported": report.num_sound,
            "num_refused": report.num_refused,
            "refused": dict(sorted(report.kinds.items())),
            "notes": dict(sorted(report.notes.items())),
            "remarks": report.remarks,
            "shards": [asdict(shard) for shard in shards],
        },
    )
    return report, shards, format


def _write(path: Path, about: dict[str, Any]) -> None:
    path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _prepare(out: Path, overwrite: bool) -> None:
    """An empty place for the shards: one folder an import."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; accepted is a folder")
    earlier = sorted(out.glob("*.tar")) + [
        path for path in (out / "import.json", out / "rejected.jsonl") if path.exists()
    ]
    if earlier and not overwrite:
        raise ValueError(
            f"--out {out} already holds {earlier[0].name}; each import has a folder of its own: give another, or "
            "--overwrite to replace an earlier import"
        )
    if earlier:
        _remove_import(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "import.json").touch()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from None


def _remove_import(out: Path) -> None:
    """Remove what an earlier import wrote, finished or not, and nothing else."""
    try:
        stem = str(json.loads((out / "import.json").read_text(encoding="utf-8"))["stem"])
    except (OSError, ValueError, KeyError, TypeError):
        stem = ""
    if re.fullmatch(r"[A-Za-z0-9_.-]+", stem):
        for path in out.glob(f"{stem}-[0-9][0-9][0-9][0-9][0-9][0-9].tar*"):
            path.unlink(missing_ok=True)
    left = sorted(out.glob("*.tar"))
    if left:
        raise ValueError(f"--out {out} holds {left[0].name}, which no import wrote; give another folder")
    for name in ("import.json", "rejected.jsonl"):
        (out / name).unlink(missing_ok=True)
