"""Examples to one packed batch.

Rows are trimmed to the longest one, so that short micro-batches cost less than `seq_len`. Whatever cannot be packed is
named in `Batch.skipped`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from step3vl.data.packing import LossWeight, first_fit, round_up, weigh
from step3vl.types import IGNORE_INDEX, Batch, Example, Grids

MULTIPLE = 8
"""Row lengths are rounded up to this many tokens, which matrix kernels prefer."""


def collate(
    examples: Sequence[Example],
    seq_len: int,
    loss_weight: LossWeight = "token",
    pad_id: int = 0,
    skipped: Sequence[str] = (),
) -> Batch:
    """Pack examples first-fit into rows of at most `seq_len` tokens.

    Positions restart at each sample; padding at the end of a row is a document of its own, without labels. Views,
    sample ids and visual token counts are in reading order over the rows. With nothing to pack the batch is one row
    of padding, so that a rank that met only bad samples still takes its step.
    """
    problems = list(skipped)
    kept: list[Example] = []
    for example in examples:
        if len(example.input_ids) > seq_len:
            problems.append(f"{example.id}: {len(example.input_ids)} tokens do not fit into seq_len {seq_len}")
        else:
            kept.append(example)
    rows = first_fit([len(example.input_ids) for example in kept], seq_len) or [[]]
    lengths = [sum(len(kept[i].input_ids) for i in row) for row in rows]
    num_columns = min(round_up(max(*lengths, 1), MULTIPLE), seq_len)

    shape = (len(rows), num_columns)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)  # [B,T]
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)  # [B,T]
    loss_weights = torch.zeros(shape)  # [B,T]
    position_ids = torch.zeros(shape, dtype=torch.long)  # [B,T]
    order: list[Example] = []
    for b, row in enumerate(rows):
        at = 0
        for example in (kept[i] for i in row):
            span = slice(at, at + len(example.input_ids))
            input_ids[b, span] = example.input_ids
            labels[b, span] = example.labels
            loss_weights[b, span] = weigh(example.labels, loss_weight)
            position_ids[b, span] = example.position_ids
            order.append(example)
            at = span.stop
        position_ids[b, at:] = torch.arange(num_columns - at)
    views = [view for example in order for view in example.views]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        loss_weights=loss_weights,
        position_ids=position_ids,
        images=Grids.stack(views) if views else None,
        sample_ids=[example.id for example in order],
        num_visual_tokens=[example.num_visual_tokens for example in order],
        num_padding=len(rows) * num_columns - sum(lengths),
        skipped=problems,
    )
