"""R1, R2: a run that is killed again and again is, bit for bit, the run that never was."""

import random
import time
from functools import partial
from pathlib import Path

import pytest

from .processes import FSDP2, RUN, Run
from .record import by_step, read

LONG = "--trainer.max_steps=60"
SFT = RUN.replace("1_pretrain_phase1", "3_sft_stage1").replace("--data.samples_per_step=4", "--data.rows_per_step=1")
SFT += " --data.seq_len=512 --model.init_from=null"
MOMENTS = ("saving", "epoch", "any")
"""While a checkpoint is half written; around the end of an epoch (every 4 steps); at any time."""


def killed(folder, num_kills, *more, num_ranks=1, num_steps=9, seed=0, run=RUN):
    """Start, kill at a moment of a kind, start again; at last let it end. Returns how often each kind was met."""
    rng, met = random.Random(seed), dict.fromkeys(MOMENTS, 0)
    stride = (num_steps - 1) // num_kills  # many kills must leave each other something to kill
    for number in range(num_kills):
        kind = MOMENTS[number % len(MOMENTS)]
        start = Run(folder, *more, num_ranks=num_ranks, run=run)
        first = start.newest()
        step = first + rng.randint(1, stride)
        if kind == "epoch":
            step = first - first % 4 + 4
        if start.until(partial(has_taken, folder, len(read(folder)), min(step, num_steps - 1))) and (
            kind != "saving" or start.until(start.is_writing)
        ):
            time.sleep(0 if kind == "saving" else rng.uniform(0, 0.1))
            start.kill()
            met[kind] += 1
        else:
            start.finish()
    last = Run(folder, *more, num_ranks=num_ranks, run=run)
    last.finish()
    assert not [path for path in (Path(folder) / "checkpoints").iterdir() if path.name.startswith(".")], "leftovers"
    return met


def has_taken(folder, num_before, step):
    return any(line["step"] >= step for line in read(folder)[num_before:])


def assert_same_run(found, wanted, num_ranks=1, num_steps=9):
    for rank in range(num_ranks):
        one, other = by_step(found, rank), by_step(wanted, rank)
        assert sorted(one) == sorted(other) == list(range(1, num_steps + 1))
        for step, line in other.items():
            changed = [key for key in line if one[step][key] != line[key]]
            assert not changed, f"rank {rank}, step {step}: {changed} differ from the uninterrupted run"


def test_one_rank(workplace, whole):
    assert killed("killed", 3) == {"saving": 1, "epoch": 1, "any": 1}
    assert_same_run("killed", whole)


def test_two_sharded_ranks(workplace, two):
    """One kill of both, while a checkpoint is half written."""
    assert killed("killed", 1, *FSDP2, num_ranks=2)["saving"] == 1
    assert_same_run("killed", two, num_ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills(workplace, record_property, workers):
    more = [LONG, f"--data.num_workers={workers}"]
    Run("whole", *more).finish()
    met = killed("killed", 20, *more, num_steps=60, seed=workers)
    assert sum(met.values()) == 20
    assert_same_run("killed", "whole", num_steps=60)
    record_property("figure", f"R1 pre-training, {workers} workers: 20 kills ({told(met)}), 60 steps bit-equal")


@pytest.mark.slow
def test_twenty_kills_of_fine_tuning(workplace, record_property):
    """Packed rows, planned ahead and dealt by their cost: what is planned and not yet taken must be saved too."""
    Run("whole", LONG, run=SFT).finish()
    met = killed("killed", 20, LONG, num_steps=60, run=SFT)
    assert sum(met.values()) == 20
    assert_same_run("killed", "whole", num_steps=60)
    record_property("figure", f"R1 fine-tuning, packed rows: 20 kills ({told(met)}), 60 steps bit-equal")


@pytest.mark.slow
def test_ten_kills_of_two_sharded_ranks(workplace, record_property):
    more = [LONG, *FSDP2]
    Run("whole", *more, num_ranks=2).finish()
    met = killed("killed", 10, *more, num_ranks=2, num_steps=60)
    assert sum(met.values()) == 10
    assert_same_run("killed", "whole", num_ranks=2, num_steps=60)
    record_property("figure", f"R2 two FSDP2 ranks: 10 kills ({told(met)}), 60 steps bit-equal on both")


@pytest.mark.slow
def test_fifty_kills(workplace, record_property):
    more = "--trainer.max_steps=150"
    Run("whole", more).finish()
    met = killed("killed", 50, more, num_steps=150, seed=2)
    assert sum(met.values()) == 50
    assert_same_run("killed", "whole", num_steps=150)
    record_property("figure", f"R19 kills in one run: 50 ({told(met)}), 150 steps bit-equal")


def told(met):
    return ", ".join(f"{count} {kind}" for kind, count in met.items())
