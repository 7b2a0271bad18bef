"""One packed batch: nothing lost, order kept, padding apart."""

from __future__ import annotations

import torch

from step3vl.data.collate import collate
from step3vl.types import IGNORE_INDEX, Example


def example(id: str, length: int, views: tuple[float, ...] = (), num_learnt: int = 2) -> Example:
    ids = torch.arange(1, length + 1) + 100 * ord(id[0])
    labels = torch.full((length,), IGNORE_INDEX)
    labels[-num_learnt - 1 : -1] = ids[-num_learnt:]
    pixels = [torch.full((3, 6 if value < 10 else 4, 6 if value < 10 else 4), value) for value in views]
    return Example(
        id=id,
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(length),
        views=pixels,
        num_visual_tokens=3 * len(views),
    )


def test_rows_hold_the_examples_and_padding_is_a_document_of_its_own():
    a, b, c = example("a", 9), example("b", 12), example("c", 5)
    batch = collate([a, b, c], seq_len=16, pad_id=7)
    assert batch.sample_ids == ["a", "c", "b"]
    assert batch.input_ids.shape == (2, 16)
    assert torch.equal(batch.input_ids[0], torch.cat([a.input_ids, c.input_ids, torch.tensor([7, 7])]))
    assert torch.equal(batch.labels[0], torch.cat([a.labels, c.labels, torch.tensor([IGNORE_INDEX] * 2)]))
    assert batch.position_ids[0].tolist() == [*range(9), *range(5), 0, 1]
    assert batch.position_ids[1].tolist() == [*range(12), *range(4)]
    assert batch.loss_weights[0].sum() == 4 and (batch.loss_weights[1, 12:] == 0).all()
    assert batch.num_padding == 2 + 4
    assert batch.images is None and batch.skipped == []


def test_rows_are_trimmed_to_a_multiple_of_eight_but_never_beyond_seq_len():
    assert collate([example("a", 9)], seq_len=4096).input_ids.shape == (1, 16)
    assert collate([example("a", 9)], seq_len=12).input_ids.shape == (1, 12)
    assert collate([example("a", 8)], seq_len=64).num_padding == 0


def test_views_follow_the_rows():
    batch = collate([example("a", 9, (1.0, 11.0)), example("b", 12, (2.0,)), example("c", 5, (13.0, 3.0))], seq_len=16)
    assert batch.sample_ids == ["a", "c", "b"]
    assert batch.num_visual_tokens == [6, 6, 3]
    assert batch.images is not None
    assert [float(view.mean()) for view in batch.images.unstack()] == [1, 11, 13, 3, 2]
    assert sorted(tuple(tensor.shape) for tensor in batch.images.tensors) == [(2, 3, 4, 4), (3, 3, 6, 6)]


def test_loss_weights_by_sample():
    batch = collate([example("a", 9, num_learnt=4), example("b", 7, num_learnt=1)], seq_len=16, loss_weight="sample")
    assert batch.loss_weights.sum() == 2
    assert batch.loss_weights[0].max() == 1 and batch.loss_weights[0, :9].max() == 0.25
    assert torch.equal(batch.loss_weights > 0, batch.labels != IGNORE_INDEX)


def test_what_does_not_fit_is_named():
    batch = collate([example("a", 9), example("b", 30)], seq_len=16, skipped=["z: broken"])
    assert batch.sample_ids == ["a"]
    assert batch.skipped == ["z: broken", "b: 30 tokens do not fit into seq_len 16"]


def test_nothing_to_pack_is_a_row_of_padding():
    batch = collate([], seq_len=16, pad_id=5, skipped=["z: broken"])
    assert batch.input_ids.tolist() == [[5] * 8]
    assert (batch.labels == IGNORE_INDEX).all() and batch.loss_weights.sum() == 0
    assert batch.position_ids.tolist() == [list(range(8))]
    assert batch.num_padding == 8 and batch.sample_ids == []
