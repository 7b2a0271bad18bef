"""First-fit and loss weights."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

from step3vl.data.packing import Packer, first_fit, round_up, weigh
from step3vl.types import IGNORE_INDEX


def test_first_fit_takes_the_first_row_with_room():
    assert first_fit([5, 4, 3, 4, 1], 8) == [[0, 2], [1, 3], [4]]
    assert first_fit([5, 4, 3, 1, 2], 8) == [[0, 2], [1, 3, 4]]
    assert first_fit([8, 8], 8) == [[0], [1]]
    assert first_fit([], 8) == []


def test_first_fit_keeps_everything_once_and_in_bounds():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randrange(1, 65) for _ in range(rng.randrange(1, 60))]
        rows = first_fit(lengths, 64)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
        assert all(row == sorted(row) for row in rows)
        assert len(rows) <= 2 * math.ceil(sum(lengths) / 64)


def test_too_long_is_an_error():
    with pytest.raises(ValueError, match="item 1 has 9 tokens and cannot be packed into rows of 8"):
        first_fit([3, 9], 8)


@pytest.mark.parametrize(("loss_weight", "total"), [("token", 4.0), ("sample", 1.0), ("sqrt", 2.0)])
def test_weights(loss_weight, total):
    labels = torch.tensor([IGNORE_INDEX, 3, 4, IGNORE_INDEX, 5, 6])
    weights = weigh(labels, loss_weight)
    assert weights.dtype == torch.float32
    assert float(weights.sum()) == pytest.approx(total)
    assert torch.equal(weights > 0, labels != IGNORE_INDEX)
    assert len(set(weights[labels != IGNORE_INDEX].tolist())) == 1


def test_weights_of_nothing_and_of_an_unknown_kind():
    assert weigh(torch.full((3,), IGNORE_INDEX), "sample").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="loss_weight must be one of token, sqrt, sample, got 'square'"):
        weigh(torch.tensor([1]), "square")


def test_rounding():
    assert [round_up(n, 8) for n in (1, 8, 9)] == [8, 8, 16]


def packed(lengths, seq_len, **options):
    packer, rows = Packer(seq_len, **options), []
    for i, length in enumerate(lengths):
        rows += packer.add(i, length)
    return packer, rows


@pytest.mark.parametrize("mean", [5.2, 8.8], ids=["captions", "long answers"])
def test_open_rows_fill_to_98_percent(mean):
    lengths = np.random.default_rng(0).lognormal(mean, 0.8, 20_000).clip(8, 32768).astype(int).tolist()
    packer, rows = packed(lengths, 32768)
    total = sum(lengths[i] for row in rows for i in row)
    assert total / (len(rows) * 32768) > 0.98
    assert all(sum(lengths[i] for i in row) <= 32768 for row in rows)
    waiting = [i for _, _, items in packer.state_dict()["open"] for i in items]
    assert sorted([i for row in rows for i in row] + waiting) == list(range(20_000))
    assert packer.num_open <= 32 and len(json.dumps(packer.state_dict())) < 8192


@pytest.mark.parametrize("seed", range(40))
def test_packer_loses_nothing_and_resumes_anywhere(seed):
    rng = random.Random(seed)
    items = [(rng.randint(1, 40), rng.randint(0, 3)) for _ in range(rng.randint(0, 60))]
    cut, max_open = rng.randint(0, 59), rng.randint(1, 5)

    def run(packer, part):
        return [row for i, (length, views) in part for row in packer.add(i, length, views)]

    numbered = list(enumerate(items))
    straight = Packer(40, max_views=4, max_open=max_open)
    rows = run(straight, numbered)
    first = Packer(40, max_views=4, max_open=max_open)
    before = run(first, numbered[:cut])
    second = Packer(40, max_views=4, max_open=max_open)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, numbered[cut:]) == rows
    assert second.state_dict() == straight.state_dict()
    state = straight.state_dict()["open"]
    held = [items for _, _, items in state]
    assert sorted(i for row in rows + held for i in row) == list(range(len(items)))
    for row in rows + held:
        assert sum(items[i][0] for i in row) <= 40 and sum(items[i][1] for i in row) <= 4
    for room, views, row in state:
        assert room == 40 - sum(items[i][0] for i in row) and views == sum(items[i][1] for i in row)
    assert len(held) <= max_open


def test_packer_refusals():
    with pytest.raises(ValueError, match="an item of 9 tokens cannot be packed into rows of 8"):
        Packer(8).add("a", 9)
    with pytest.raises(ValueError, match="an item of 3 views cannot be packed into rows of at most 2"):
        Packer(8, max_views=2).add("a", 1, 3)
    with pytest.raises(ValueError, match="seq_len is 8, but the state to resume from has rows of 16"):
        Packer(8).load_state_dict(Packer(16).state_dict())
