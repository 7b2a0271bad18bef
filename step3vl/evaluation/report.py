"""metrics.json and cases.jsonl of a run: scores with everything needed to doubt them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .benchmark import Benchmark, Case
from .runner import Record
from .statistics import majority_score, summarise


def write_report(
    folder: Path,
    suite: Mapping[str, Benchmark],
    records: Sequence[Record],
    facts: dict[str, Any],
    cases: Mapping[str, Sequence[Case]] | None = None,
) -> dict:
    """Write `metrics.json` (scores and provenance) and `cases.jsonl` into `folder`; return the former.

    `cases` are those that were asked, by benchmark; None: they are read again.
    """
    scores = {}
    for name, benchmark in suite.items():
        own = [r for r in records if r.benchmark == name]
        if own:
            answered = {r.id for r in own}
            asked = [case for case in (benchmark.cases() if cases is None else cases[name]) if case.id in answered]
            scores[name] = asdict(summarise(own, majority_score(benchmark, asked), benchmark))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in records))
    return write_scores(folder, scores, facts)


def write_scores(folder: Path, scores: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> dict:
    """Write `metrics.json` into `folder`, whole or not at all, and return it. A row has the keys of `Score`."""
    metrics = {"scores": dict(scores), "provenance": provenance() | dict(facts)}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "metrics.json.part"
    partial.write_text(json.dumps(metrics, indent=2) + "\n")
    partial.replace(folder / "metrics.json")
    return metrics


def provenance() -> dict[str, Any]:
    """Where and with what a number was made."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    names = ("step3vl", "torch", "transformers", "lightning")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {
        "commit": commit.stdout.strip() if commit.returncode == 0 else "not a git checkout",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }
