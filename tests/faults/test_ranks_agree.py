"""R9, R10: what happens on one rank only is known to all; none waits for ever."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step3vl.callbacks.heartbeat import EXIT_RANK_LOST

from .processes import FSDP2, RUN, Run
from .record import by_step, read

HEARTBEAT = ("step3vl.callbacks.Heartbeat", {"every_s": 0.5, "timeout_s": 4.0})


def test_a_bad_step_of_one_rank_is_refused_by_both(workplace):
    """A loss that is no number in step 1, an infinite gradient in step 3, then two bad steps in a row: the end."""
    poison = ("tests.faults.inject.Poison", {"losses": [1, 5, 6], "gradients": [3]})
    run = Run("run", *FSDP2, "--model.guard.stop_after=2", num_ranks=2, callbacks=[poison, HEARTBEAT])
    assert run.wait() == [2, 2], run.said()
    for rank in (0, 1):
        steps = by_step("run", rank)
        for step in range(2, 7):
            kept = [steps[step][key] == steps[step - 1][key] for key in ("weights", "moments")]
            assert kept == [step in (2, 4, 6)] * 2, f"rank {rank}, step {step}"
        assert "error: 2 steps in a row were refused" in run.said(rank)
    told = [f"samples of that step on rank 1: {', '.join(by_step('run', 1)[step]['ids'])}" for step in (2, 4)]
    assert all(line in run.said(1) for line in told)
    assert run.said(0).count("samples of that step on rank 0") == 1, "of the step whose gradient alone tells"
    assert "step 1 refused: the loss is nan" in run.said(0) and "step 3 refused: the norm of" in run.said(0)


@pytest.mark.slow
def test_a_rank_without_a_usable_sample_keeps_step(workplace):
    """Most samples are longer than the 60 tokens of a row: every rank takes every step all the same."""
    short = ["--data.seq_len=60", "--data.samples_per_step=2", "--trainer.max_steps=5"]
    run = Run("run", "--trainer.strategy=strategy/fsdp2.yaml", *short, num_ranks=2, callbacks=[HEARTBEAT])
    run.finish()
    steps = [by_step("run", rank) for rank in (0, 1)]
    assert list(steps[0]) == list(steps[1]) == list(range(1, 6))
    nums = [[len(line["ids"]) for line in rank.values()] for rank in steps]
    assert 0 in nums[0] + nums[1] and nums[0] != nums[1], nums


@pytest.mark.parametrize(
    ("number", "lost"),
    [
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_is_named_and_the_other_ends(workplace, record_property, number, lost):
    run = Run("run", *FSDP2, num_ranks=2, callbacks=[HEARTBEAT])
    assert run.until(lambda: len(read("run", 1 - lost)) >= 3)
    run.send(number, lost)
    other, start_s = run.processes[1 - lost], time.monotonic()
    other.join(20)
    passed_s = time.monotonic() - start_s
    assert other.exitcode == EXIT_RANK_LOST, run.said(1 - lost)[-3000:]
    run.kill()
    step = len(read("run", 1 - lost))
    said = run.said(1 - lost)
    assert f"error: rank {lost} on {socket.gethostname()}, last seen at step " in said
    assert f"rank {1 - lost} on {socket.gethostname()} ends at step {step} with status 86" in said
    name = signal.Signals(number).name
    record_property(
        "figure", f"R9 rank {lost} of 2 gets {name}: named, the other ended after {passed_s:.1f} s (4 s set)"
    )


@pytest.mark.slow
def test_the_death_of_a_rank_that_lightning_started_is_told_before_all_end(workplace, record_property):
    """Through `python -m step3vl`, where Lightning starts the second rank, and would kill the first without a word."""
    seldom = "[{class_path: step3vl.callbacks.Heartbeat, init_args: {every_s: 0.5, timeout_s: 60}}]"
    words = ["fit", *RUN.split(), *FSDP2, "--trainer.devices=2", f"--trainer.callbacks={seldom}"]
    words += ["--trainer.max_steps=1000", "--trainer.default_root_dir=run", "--trainer.enable_checkpointing=false"]
    with open("said.txt", "w") as out:
        first = subprocess.Popen([sys.executable, "-m", "step3vl", *words], stdout=out, stderr=out)
    rows, start_s = Path("run/csv/version_0/metrics.csv"), time.monotonic()
    while not rows.exists() and time.monotonic() - start_s < 120:
        time.sleep(0.1)
    (other,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    start_s = time.monotonic()
    assert first.wait(60) == EXIT_RANK_LOST, Path("said.txt").read_text()[-3000:]
    passed_s = time.monotonic() - start_s
    said = Path("said.txt").read_text()
    assert f"error: rank 1 on {socket.gethostname()}, last seen at step " in said and "was killed by SIGKILL" in said
    record_property("figure", f"R9 a rank killed: named, all ended after {passed_s:.1f} s (a beat every 0.5 s)")
