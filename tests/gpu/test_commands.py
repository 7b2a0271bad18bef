"""The real command line on one GPU, at tiny scale: fit, fit with FSDP2 on one rank, ask, and the step benchmark."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from step3vl.ablation.plot import read_curve

from . import needs_gpu

pytestmark = needs_gpu

ROOT = Path(__file__).parents[2]
FILE = ["-c", "experiments/step3vl_10b/1_pretrain_phase1.yaml", "--scale", "tiny"]
SHORT = ["--trainer.max_steps=6", "--trainer.log_every_n_steps=1", "--data.samples_per_step=8", "--vars.warmup_steps=0"]
GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=bf16-mixed"]
CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
FSDP2 = "--trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy,"
FSDP2 += " init_args: {data_parallel_size: 1, tensor_parallel_size: 1}}"
MEASURE = "--trainer.callbacks=[{class_path: step3vl.callbacks.Throughput, init_args: {every_n_steps: 2}},"
MEASURE += " {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {save_last: true}}]"


def step3vl(*words: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "step3vl", *words], env=dict(os.environ), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(folder: str, *more: str) -> list[float]:
    step3vl("fit", *FILE, *SHORT, MEASURE, f"--trainer.default_root_dir={folder}", *more)
    found = [float(loss) for loss in read_curve(Path(folder))[1]]
    assert len(found) == 6 and all(map(math.isfinite, found))
    return found


def logged(folder: str, name: str) -> list[float]:
    with next(Path(folder).glob("csv/version_*/metrics.csv")).open() as file:
        return [float(line[name]) for line in csv.DictReader(file) if line.get(name)]


def test_fit_on_one_gpu_equals_the_cpu_and_answers(workplace):
    on_gpu, on_cpu = losses("gpu", *GPU), losses("cpu", *CPU)
    assert on_gpu == pytest.approx(on_cpu, rel=0.02) and on_gpu[-1] < on_gpu[0]
    utilisation = logged("gpu", "mfu")
    assert utilisation and all(0 < mfu < 1 for mfu in utilisation)
    step3vl("ask", "gpu", "2 + 3 =", "--max-new-tokens", "4")


def test_fit_with_fsdp2_on_one_rank_equals_no_sharding(workplace):
    assert losses("sharded", *GPU, FSDP2) == pytest.approx(losses("whole", *GPU), rel=0.02)


def test_the_step_benchmark_runs_on_the_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--scale", "tiny", "--steps", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["device"] != "cpu" and found["peak_memory_gib"] > 0
    assert 0 < found["mfu"] < found["hardware_utilisation"] < 1
