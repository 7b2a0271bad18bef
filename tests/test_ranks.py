"""Real processes (gloo) behind the real command line: ranks, strategies and recomputation change nothing.

Exact normalisation over ranks, shards that are gathered and summed right, weights drawn alike, checkpoints that another
number of ranks goes on from (R5).
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from step3vl.cli import main

RUN = "-c experiments/step3vl_10b/1_pretrain_phase1.yaml --scale tiny --trainer.max_steps=4 --trainer.precision=32-true"
RUN += " --trainer.callbacks=null --trainer.log_every_n_steps=1 --vars.warmup_steps=0"
ADAMW = ["--model.optimizer=optimizer/adamw.yaml", "--model.optimizer.lr=1e-3"]
MUON = ["--model.optimizer=optimizer/muon.yaml", "--model.optimizer.lr=4e-3", "--model.optimizer.ns_dtype=float32"]
SGD = ["--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.05}}", "--trainer.gradient_clip_val=null"]
DEEP = ["--model.vlm.deepstack=deepstack/pool_mlp.yaml"]
ANSWERS = ["--trainer.callbacks=[{class_path: step3vl.callbacks.Answers, init_args: {every_n_steps: 2}}]"]
SAVES = ["--trainer.callbacks=[{class_path: step3vl.callbacks.Checkpoints, init_args: {every_n_steps: 2}}]"]


def strategy(name, ranks, *more):
    return [f"--trainer.strategy=strategy/{name}.yaml", f"--trainer.devices={ranks}", *more]


def curve(folder, *more, samples=12):
    """Train, and read each step's loss and gradient norm; `samples` is what a rank sees in a step."""
    command = [sys.executable, "-m", "step3vl", "fit", *RUN.split(), *ADAMW, f"--trainer.default_root_dir={folder}"]
    done = subprocess.run(
        [*command, f"--data.samples_per_step={samples}", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = Path(folder).glob("csv/version_*/metrics.csv")
    rows = [row for row in csv.DictReader(table.open()) if row["loss"]]
    return [float(row["loss"]) for row in rows], [float(row["grad_norm"]) for row in rows]


def assert_same(found, wanted, tolerance=1e-6):
    """Losses within `tolerance` of themselves; norms within the rounding of an fp32 sum over a million squares."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance) and len(found[0]) == len(wanted[0])
    assert found[1][0] == pytest.approx(wanted[1][0], rel=5e-5)


def test_two_sharded_ranks_that_recompute_and_answer_equal_one_that_stores(workplace):
    one = curve("one", *DEEP)
    two = curve("two", *DEEP, *ANSWERS, "--model.recompute=blocks", *strategy("fsdp2", 2), samples=6)
    assert_same(two, one)
    assert len(one[0]) == 4 and one[0][-1] < one[0][0]


def test_muon_on_two_sharded_ranks_equals_one(workplace):
    """Newton-Schulz in fp32: in bf16 the order of a sum decides roundings, and losses differ by up to 2e-3."""
    assert_same(curve("two", *MUON, *strategy("fsdp2", 2), samples=6), curve("one", *MUON))


def test_two_replicated_ranks_equal_one(workplace):
    """SGD without clipping: others would hide a constant factor. Rows are planned from token shares, dealt by FLOPs."""
    rows = ["--data.samples_per_step=null", "--data.seq_len=512", "--data.mix_by=tokens", "--data.balance=true", *SGD]
    one = curve("one", *rows, "--data.rows_per_step=4")
    two = curve("two", *rows, "--data.rows_per_step=2", *strategy("ddp", 2))
    assert_same(two, one)
    assert one[0][-1] < one[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [ADAMW, MUON, SGD], ids=["adamw", "muon", "sgd"])
def test_every_strategy_gives_the_same_run(workplace, optimizer):
    one = curve("single", *optimizer, "--trainer.strategy=strategy/single.yaml")
    hybrid = ["--trainer.strategy.data_parallel_size=2", "--trainer.strategy.replicate_size=2"]
    for name, ranks, more in (
        ("fsdp2", 1, []),
        ("fsdp2", 2, ["--model.recompute=decoder"]),
        ("ddp", 2, ["--model.recompute=vision"]),
        ("fsdp2", 3, []),
        ("hsdp", 4, hybrid),
    ):
        found = curve(f"{name}_{ranks}", *optimizer, *strategy(name, ranks, *more), samples=12 // ranks)
        assert_same(found, one)


@pytest.mark.slow
def test_bf16_gathers_stay_close(workplace):
    mixed = ["--trainer.precision=bf16-mixed"]
    one = curve("one", *mixed)
    gathers = ["--trainer.strategy.gather_dtype=bfloat16", "--trainer.strategy.reduce_dtype=float32"]
    two = curve("two", *mixed, *strategy("fsdp2", 2, *gathers), samples=6)
    assert_same((two[0], [two[1][0]]), (one[0], [two[1][0]]), tolerance=5e-4)
    assert two[1][0] == pytest.approx(one[1][0], rel=1e-2)


def goes_on_as_before(optimizer, ranks, tolerance):
    """Save on two ranks at step 2 of 4; each other number of ranks has the losses of the uninterrupted run (R5)."""
    whole = curve("two", *optimizer, *SAVES, *strategy("fsdp2", 2), samples=6)
    for number in ranks:
        more = [*SAVES, *strategy("fsdp2", number), "--ckpt_path=two/checkpoints/step-00000002"]
        resumed = curve(f"on_{number}", *optimizer, *more, samples=12 // number)
        assert_same(resumed, (whole[0][2:], whole[1][2:]), tolerance)
        assert number != 2 or resumed == (whole[0][2:], whole[1][2:]), "the same number of ranks is bit-equal"


def test_three_ranks_go_on_from_a_checkpoint_of_two(workplace):
    goes_on_as_before(ADAMW, (3,), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_two(workplace, optimizer):
    goes_on_as_before(optimizer, (1, 2, 3, 4), 1e-6)


def test_two_ranks_start_from_the_same_checkpoint(workplace):
    """init_from under FSDP2: each rank reads its own rows, and the first losses are those of one rank."""
    assert main(["make-tiny", "step3vl", "released"]) == 0 and main(["import", "released", "ours"]) == 0
    start = ["--model.vlm=ours/vlm.yaml", "--model.processor.tokenizer=released", "--trainer.max_steps=1"]
    one = curve("one", *start, "--model.init_from=ours")
    two = curve("two", *start, "--model.init_from=ours", *strategy("fsdp2", 2), samples=6)
    fresh = curve("fresh", *start)
    assert_same(two, one)
    assert abs(fresh[0][0] - one[0][0]) > 1e-3, "random weights gave the same loss: the checkpoint was not read"


def test_sizes_that_are_not_the_number_of_ranks_are_refused_with_the_right_one(workplace, capsys):
    run = ["fit", *RUN.split(), *ADAMW]
    sizes = ["--trainer.strategy.data_parallel_size=3", "--trainer.strategy.replicate_size=1"]
    assert main([*run, *strategy("hsdp", 1, *sizes)]) == 2
    error = capsys.readouterr().err
    assert "is 1 x 3 x 1, but there are 1 ranks" in error and "--trainer.strategy.data_parallel_size=1" in error
    assert main([*run, *strategy("fsdp2", 1, "--trainer.strategy.gather_dtype=float16")]) == 2
    assert "trainer.strategy.gather_dtype is 'float16'; accepted are 'float32'" in capsys.readouterr().err
