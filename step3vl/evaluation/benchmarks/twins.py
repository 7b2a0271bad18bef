"""Twins: small files in the very columns of the published benchmarks, filled from the generated corpus.

They let every benchmark run from its file to its number without a download. A score on a twin says nothing about the
benchmark whose columns it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from . import choice, counting, diagrams, mathematics, pointing, programs, reading, reasoning
from . import twin_rows as made
from .hub import HubBenchmark, Row
from .twin_source import Corpus


def write_twins(corpus: Path, out: Path, num_cases: int = 32, only: Iterable[str] = ()) -> list[Path]:
    """Write a twin of every benchmark, or of those named by class, under its dataset's name; returns the files.

    Raises:
        ValueError: the corpus lacks a subset that a twin is made from, or a name is not a benchmark.
    """
    wanted = list(only) or [kind.__name__ for kind in TWINS]
    known = {kind.__name__: kind for kind in TWINS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"there is no twin of {unknown[0]!r}; there are {', '.join(known)}")
    source = Corpus(corpus)
    return [_write(known[name], TWINS[known[name]](source, num_cases), out) for name in wanted]


def _write(kind: type[HubBenchmark], rows: list[Row], out: Path) -> Path:
    config = [kind.config] if kind.config else []
    folder = out.joinpath(kind.repo, *config, *([] if kind is choice.AllAngles else ["data"]))
    folder.mkdir(parents=True, exist_ok=True)
    if kind is choice.AllAngles:  # images lie beside its rows
        for row in rows:
            for name, data in row.pop("files").items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        file = folder / f"{kind.split}.json"
        file.write_text(json.dumps(rows))
        return file
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    file = folder / f"{kind.split}-00000-of-00001.parquet"
    table = arrow.Table.from_pylist(rows)
    images = {field.name: {"_type": "Image"} for field in table.schema if arrow.types.is_struct(field.type)}
    features = {"huggingface": json.dumps({"info": {"features": images}})}  # by which `datasets` knows images
    parquet.write_table(table.replace_schema_metadata(features), file)
    return file


TWINS: dict[type[HubBenchmark], Callable[[Corpus, int], list[Row]]] = {
    choice.MMMU: made.mmmu,
    mathematics.MathVista: made.mathvista,
    mathematics.MathVision: made.mathvision,
    choice.MMBench: made.mmbench,
    choice.MMStar: made.mmstar,
    reading.OCRBench: made.ocrbench,
    mathematics.AIME2025: made.aime,
    mathematics.HMMT2025: made.hmmt,
    programs.LiveCodeBench: made.livecodebench,
    reasoning.PhyX: made.phyx,
    reasoning.ReMI: made.remi,
    choice.AI2D: made.ai2d,
    pointing.ScreenSpotV2: made.screenspot_v2,
    pointing.ScreenSpotPro: made.screenspot_pro,
    pointing.OSWorldG: made.osworld_g,
    choice.BLINK: made.blink,
    choice.AllAngles: made.all_angles,
    diagrams.HumanEvalV: made.humaneval_v,
    choice.MMVP: made.mmvp,
    reading.SimpleVQA: made.simplevqa,
    choice.CCBench: made.mmbench,
    choice.VStar: made.vstar,
    counting.CountBench: made.countbench,
    pointing.RefCOCO: made.refcoco,
}
"""What a twin's rows are made of, by benchmark."""
