"""R19: a run that goes on for hours holds no more memory and no more open files than after its first minutes.

STEP3VL_SOAK_S says for how many seconds (7200); the first fifth is warm-up.
"""

import os
import signal
import time
from pathlib import Path
from statistics import median

import pytest

from step3vl.signals import EXIT_UNFINISHED

from .processes import Run
from .record import read

SOAK_S = float(os.environ.get("STEP3VL_SOAK_S", 7200))


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 600)
def test_memory_and_open_files_do_not_grow(workplace, record_property):
    endless = ["--trainer.max_steps=10000000", "--data.num_steps=50"]
    requeue = ("step3vl.callbacks.Requeue", {})
    run = Run("run", *endless, callbacks=[requeue], saves={"every_n_steps": 20})
    assert run.until(lambda: len(read("run")) >= 3)
    pid, start_s, seen = run.processes[0].pid, time.monotonic(), []
    while time.monotonic() - start_s < SOAK_S:
        time.sleep(min(5.0, SOAK_S / 100))
        assert run.processes[0].is_alive(), run.said()[-3000:]
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        seen.append((memory, len(os.listdir(f"/proc/{pid}/fd"))))
    run.send(signal.SIGTERM)
    assert run.wait() == [EXIT_UNFINISHED]
    Path("memory.csv").write_text("".join(f"{memory},{files}\n" for memory, files in seen))
    fifth = len(seen) // 5
    (early, early_files), (late, late_files) = (
        [median(values) for values in zip(*part)] for part in (seen[fifth : 2 * fifth], seen[-fifth:])
    )
    growth = late / early - 1
    num = len(read("run"))
    record_property(
        "figure",
        f"R19 soak of {SOAK_S:,.0f} s, {num:,} steps, {num // 20:,} saves: memory {early / 1e3:,.0f} MB {growth:+.2%}, "
        f"open files {early_files:.0f} -> {late_files:.0f}",
    )
    assert growth <= 0.01, f"memory grew by {growth:.1%}, from {early / 1e3:.0f} to {late / 1e3:.0f} MB"
    assert late_files <= early_files, f"open files grew from {early_files} to {late_files}"
