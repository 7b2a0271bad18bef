"""Rows of a step that is counted in samples: as few as first-fit makes, and padded as little as can be."""

from __future__ import annotations

import random

import torch

from step3vl.data.collate import PADDING, collate, short_rows
from step3vl.data.packing import first_fit
from step3vl.models.attention import document_lengths
from step3vl.types import IGNORE_INDEX, Example


def example(id: str, length: int) -> Example:
    ids = torch.arange(length)
    return Example(id=id, input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), position_ids=ids)


def test_short_rows_are_as_many_and_never_longer():
    assert short_rows([3, 3, 3, 3], 11) == [[0, 1], [2, 3]]
    assert short_rows([], 8) == []
    saved = 0
    for seed in range(200):
        rng = random.Random(seed)
        lengths = [min(64, int(rng.lognormvariate(2.5, 1))) or 1 for _ in range(rng.randint(1, 40))]
        plain, rows = first_fit(lengths, 64), short_rows(lengths, 64)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert len(rows) == len(plain)
        longest = [max(sum(lengths[i] for i in row) for row in packed) for packed in (plain, rows)]
        assert longest[1] <= longest[0]
        saved += longest[0] - longest[1]
    assert saved > 0


def test_a_step_just_above_a_row_is_not_half_padding():
    batch = collate([example(str(n), 100) for n in range(12)], seq_len=1024)
    assert batch.input_ids.shape == (2, 600) and batch.num_padding == 0


def test_padding_is_short_documents():
    batch = collate([example("a", 900), example("b", 500)], seq_len=1024)
    assert batch.num_padding == 2 * 904 - 1400
    assert document_lengths(batch.position_ids) == [900, 4, 500, *[PADDING] * 6, 20]
