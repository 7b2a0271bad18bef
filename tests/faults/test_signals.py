"""R12 on two sharded ranks that save in the background: at most one step is lost, and nothing in the numbers."""

import signal

import pytest

from step3vl.signals import EXIT_UNFINISHED

from .processes import FSDP2, Run
from .record import read
from .test_killed import assert_same_run

REQUEUE = [("step3vl.callbacks.Requeue", {})]
SELDOM = {"every_n_steps": 100}
TWICE = (signal.SIGTERM, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "rank"),
    [
        ((signal.SIGUSR1, signal.SIGTERM), 1),
        (TWICE, 0),
        (TWICE, None),
        ((signal.SIGUSR1, signal.SIGUSR1), None),
    ],
)
def test_signals_end_a_run_that_goes_on_to_the_same_numbers(workplace, two, record_property, numbers, rank):
    """The first signal comes in a step, the second while what it caused is being written."""
    run = Run("run", *FSDP2, num_ranks=2, callbacks=REQUEUE, saves=SELDOM)
    assert run.until(lambda: len(read("run")) >= 3)
    before = len(read("run"))
    run.send(numbers[0], rank)
    assert run.until(run.is_writing), run.said()
    run.send(numbers[1], rank)
    assert run.wait() == [EXIT_UNFINISHED] * 2, run.said()
    assert before <= run.newest() <= before + 2, "the step in progress is finished and saved, no other"
    assert run.newest() == len(read("run")), "no step is taken that is not saved"
    assert "goes on" in run.said() and "Traceback" not in run.said() + run.said(1)
    Run("run", *FSDP2, num_ranks=2, callbacks=REQUEUE, saves=SELDOM).finish()
    assert_same_run("run", two, num_ranks=2)
    names = " and ".join(number.name for number in numbers)
    who = "both ranks" if rank is None else f"rank {rank}"
    record_property("figure", f"R12 two FSDP2 ranks, {names} to {who}: no step lost, bit-equal after the resume")
