"""R13: hostile files of six families: nothing runs, nothing is written outside, none takes long or much memory.

Answers and programs that a model writes are in tests/evaluation (test_extract.py, test_math_pool.py, test_sandbox.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ("tars", "images", "rows", "configs", "weights", "templates")
MOST_MB, LONGEST_S = 1024, 10


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_files_do_nothing(family, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.nursery", family, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert len(rows) >= 25, done.stderr[-2000:]
    bad = [
        row
        for row in rows
        if row["end"] not in ("fine", "refused") or row["seconds"] > LONGEST_S or row["mb"] > MOST_MB or row["outside"]
    ]
    assert not bad, "\n".join(f"{row['name']}: {row}" for row in bad)
    assert sum(row["end"] == "refused" for row in rows) >= 4, "hardly anything was refused: the cases are not hostile"
