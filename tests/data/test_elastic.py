"""Nothing lost, nothing twice, whatever the ranks and workers: within a run (R3), and from any to any other (R4).

Ranks are simulated through the plan; workers are real processes that read, encode and pack. Shards are not divisible by
anything, two sources are mixed by tokens, and runs go on for more than two epochs of each.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import cache
from itertools import product

import pytest

from step3vl.data import Mixture, Processor, Source
from step3vl.data.loader import PackedBatches, ResumableLoader
from step3vl.data.plan import RowPlan, SamplePlan
from step3vl.data.shards import write_shards

from .test_module import TINY, picture_sample
from .test_plan import cost, text_sample

SEQ_LEN, GLOBAL, NUM_STEPS = 96, 4, 24
"""Rows (or samples, four times as many) of a step over all ranks."""
CELLS = list(product((1, 2, 4), (0, 1, 2, 3)))
"""(ranks, workers)."""
PAIRS = list(product(CELLS, CELLS))
FEW = [(cell, CELLS[(5 * k + 3) % 12]) for k, cell in enumerate(CELLS)]
"""Every cell once as where a run comes from, and once as where it goes on."""
KINDS = ("rows", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("balanced rows", "samples")))

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

Steps = list[list[str]]
"""Ids of each step, over all ranks, sorted."""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    """23 texts in shards of 5, 11 pictures in shards of 4."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    write_shards((text_sample(f"t{i}", rng.randint(2, 20)) for i in range(23)), folder, "text", 5)
    write_shards((picture_sample(f"i{i}", "1" * rng.randint(1, 9)) for i in range(11)), folder, "image", 4)
    mixed = Mixture(folder, {"text": Source("text-*", 2.0), "image": Source("image-*", 1.0)}, 7, "tokens")
    mixed.measure(PROCESSOR, SEQ_LEN)
    return mixed


PROCESSOR = Processor(template="chat").bind(TINY, lambda side: side // 4)


def plan_of(mixture: Mixture, kind: str, rank: int, num_ranks: int) -> RowPlan | SamplePlan:
    if kind == "samples":
        return SamplePlan(mixture, 4 * GLOBAL // num_ranks, rank, num_ranks)
    flops = cost if kind == "balanced rows" else None
    return RowPlan(mixture, GLOBAL // num_ranks, SEQ_LEN, rank, num_ranks, cost=flops, balance_steps=4)


def run(mixture: Mixture, kind: str, cell: tuple[int, int], num_steps: int, state=None) -> tuple[Steps, dict]:
    """What the ranks are handed in each step, and the state afterwards, as a checkpoint stores it."""
    num_ranks, num_workers = cell
    steps: Steps = [[] for _ in range(num_steps)]
    states = []
    for rank in range(num_ranks):
        batches = PackedBatches(mixture, PROCESSOR, SEQ_LEN)
        loader = ResumableLoader(batches, plan_of(mixture, kind, rank, num_ranks), 1000, num_workers)
        if state is not None:
            loader.load_state_dict(json.loads(state))
        for step, batch in zip(steps, loader):  # workers are ahead when it stops
            assert not batch.skipped
            step += batch.sample_ids
        states.append(json.dumps(loader.state_dict(), sort_keys=True))
    assert len(set(states)) == 1, "the state must not depend on the rank"
    return [sorted(step) for step in steps], states[0]


def id_of(mixture: Mixture, draw) -> str:
    shard, index = mixture.place(tuple(draw))
    return shard.key(index)


def assert_complete(mixture: Mixture, kind: str, steps: Steps, state: str) -> None:
    """What was handed out and what waits in open rows is, sample by sample, the beginning of the mixture."""
    plan = plan_of(mixture, kind, 0, 1)
    plan.load_state_dict(json.loads(state)["plan"])
    waiting = []
    if isinstance(plan, RowPlan):
        waiting = [draw for _, _, row in plan.packer.state_dict()["open"] for draw in row]
        waiting += [draw for row in plan._ready for draw in row]
        waiting += [draw for step in plan._pool[plan._done :] for hand in step for i in hand for draw in plan._rows[i]]
        assert len(waiting) < 200
    drawn = plan.draws.state_dict()["drawn"]
    assert all(num > 2 * mixture.num_samples(name) for name, num in drawn.items()), "more than two epochs"
    expected = Counter(id_of(mixture, (name, k)) for name, num in drawn.items() for k in range(num))
    found = Counter(id for step in steps for id in step) + Counter(id_of(mixture, draw) for draw in waiting)
    assert found == expected, "0 lost, 0 twice"
    for name, num in drawn.items():  # and so each sample as often as there were epochs, or once more
        counts = {expected[id_of(mixture, (name, k))] for k in range(mixture.num_samples(name))}
        assert counts <= {num // mixture.num_samples(name), num // mixture.num_samples(name) + 1}


@cache
def straight(mixture: Mixture, kind: str) -> tuple[Steps, str]:
    return run(mixture, kind, (1, 0), NUM_STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "{}x{}".format(*cell))
def test_nothing_is_lost_or_twice_for_any_ranks_and_workers(mixture, kind, cell):
    steps, state = run(mixture, kind, cell, NUM_STEPS)
    assert_complete(mixture, kind, steps, state)
    if kind != "balanced rows":  # which deals rows of like work to one step, so that steps depend on the ranks
        assert steps == straight(mixture, kind)[0]
    else:
        assert steps == run(mixture, kind, (cell[0], 0), NUM_STEPS)[0]


def assert_goes_on(mixture: Mixture, kind: str, before, after) -> None:
    stop = random.Random(f"{kind} {before} {after}").randrange(1, NUM_STEPS)
    first, state = run(mixture, kind, before, stop)
    second, end = run(mixture, kind, after, NUM_STEPS - stop, state)
    assert_complete(mixture, kind, first + second, end)
    if kind != "balanced rows":
        assert first + second == straight(mixture, kind)[0]


@pytest.mark.parametrize(("before", "after"), FEW, ids=lambda cell: "{}x{}".format(*cell))
def test_resume_with_other_ranks_and_workers(mixture, before, after):
    assert_goes_on(mixture, "rows", before, after)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda cell: "{}x{}".format(*cell))
def test_resume_from_any_ranks_and_workers_to_any_others(mixture, kind, before, after):
    assert_goes_on(mixture, kind, before, after)
