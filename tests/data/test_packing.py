"""First-fit and loss weights."""

from __future__ import annotations

import math
import random

import pytest
import torch

from step3vl.data.packing import first_fit, round_up, weigh
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
