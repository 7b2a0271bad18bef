"""Two ranks (gloo, real processes, real command line) train as one does: exact normalisation over ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from step3vl.ablation.plot import read_curve
from step3vl.cli import main

RUN = "-c experiments/step3vl_10b/1_pretrain_phase1.yaml --scale tiny --trainer.max_steps=4 --trainer.precision=32-true"
RUN += " --model.optimizer=optimizer/adamw.yaml --model.optimizer.lr=1e-3"
RUN += " --trainer.callbacks=null --trainer.log_every_n_steps=1 --vars.warmup_steps=0"
MUON = ["--model.optimizer=optimizer/muon.yaml", "--model.optimizer.lr=4e-3"]  # bf16 Newton-Schulz amplifies rounding
SGD = ["--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.05}}", "--trainer.gradient_clip_val=null"]
FSDP2 = "{class_path: lightning.pytorch.strategies.ModelParallelStrategy,"
FSDP2 += " init_args: {data_parallel_size: 2, tensor_parallel_size: 1}}"


def losses(folder, *more):
    command = [sys.executable, "-m", "step3vl", "fit", *RUN.split(), f"--trainer.default_root_dir={folder}", *more]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return read_curve(Path(folder))[1]


@pytest.mark.parametrize(
    ("strategy", "more", "tolerance"),
    [(FSDP2, ["--model.vlm.deepstack=deepstack/pool_mlp.yaml"], 2e-5), ("ddp", SGD, 2e-5), (FSDP2, MUON, 2e-3)],
    ids=["fsdp2_deepstack", "ddp_sgd", "fsdp2_muon"],
)
def test_two_ranks_equal_one(workplace, strategy, more, tolerance):
    one = losses("one", "--data.samples_per_step=8", *more)
    two = losses("two", "--data.samples_per_step=4", "--trainer.devices=2", f"--trainer.strategy={strategy}", *more)
    assert len(one) == len(two) == 4 and one[-1] < one[0]
    assert two == pytest.approx(one, abs=tolerance)


def test_two_ranks_start_from_the_same_checkpoint(workplace):
    """init_from under FSDP2: each rank reads its own rows, and the first loss is that of one rank."""
    assert main(["make-tiny", "step3vl", "released"]) == 0 and main(["import", "released", "ours"]) == 0
    start = ["--model.vlm=ours/vlm.yaml", "--model.init_from=ours", "--model.processor.tokenizer=released"]
    one = losses("one", "--data.samples_per_step=8", *start)
    more = ["--data.samples_per_step=4", "--trainer.devices=2", f"--trainer.strategy={FSDP2}"]
    two = losses("two", *more, *start)
    fresh = losses("fresh", "--data.samples_per_step=8", *start[:1], *start[2:])
    assert two == pytest.approx(one, abs=2e-5)
    assert abs(fresh[0] - one[0]) > 1e-3, "random weights gave the same loss: the checkpoint was not read"
