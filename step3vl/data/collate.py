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
PADDING = 64
"""Padding is cut into documents of this many tokens, because attention costs their square."""


def collate(
    examples: Sequence[Example],
    seq_len: int,
    loss_weight: LossWeight = "token",
    pad_id: int = 0,
    skipped: Sequence[str] = (),
) -> Batch:
    """Pack examples into the fewest rows of at most `seq_len` tokens that first-fit needs; see `collate_rows`."""
    problems = list(skipped)
    kept: list[Example] = []
    for example in examples:
        if len(example.input_ids) > seq_len:
            problems.append(f"{example.id}: {len(example.input_ids)} tokens do not fit into seq_len {seq_len}")
        else:
            kept.append(example)
    rows = short_rows([len(example.input_ids) for example in kept], seq_len)
    return collate_rows([[kept[i] for i in row] for row in rows], seq_len, loss_weight, pad_id, problems)


def short_rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """As many rows as `first_fit` makes, but about equally long: the longest row is what all are padded to.

    Example: of [3, 3, 3, 3] and rows of 11, first_fit makes [[0, 1, 2], [3]], and short_rows [[0, 1], [2, 3]].
    """
    rows = first_fit(lengths, seq_len)
    if len(rows) > 1:
        least = max(*lengths, -(-sum(lengths) // len(rows)))
        for limit in range(least, seq_len, -(-seq_len // 64)):
            shorter = first_fit(lengths, limit)
            if len(shorter) == len(rows):
                return shorter
    return rows


def collate_rows(
    rows: Sequence[Sequence[Example]],
    seq_len: int,
    loss_weight: LossWeight = "token",
    pad_id: int = 0,
    skipped: Sequence[str] = (),
) -> Batch:
    """One packed batch from examples that were dealt to rows of at most `seq_len` tokens.

    Positions restart at each sample; padding at the end of a row is documents of its own, without labels. Views,
    sample ids and visual token counts are in reading order over the rows. With nothing to pack the batch is one row
    of padding, so that a rank that met only bad samples still takes its step. Raises ValueError for a row that is too
    long.
    """
    rows = rows or [[]]
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    if max(lengths) > seq_len:
        raise ValueError(f"a row of {max(lengths)} tokens was planned for seq_len {seq_len}")
    num_columns = min(round_up(max(*lengths, 1), MULTIPLE), seq_len)

    shape = (len(rows), num_columns)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)  # [B,T]
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)  # [B,T]
    loss_weights = torch.zeros(shape)  # [B,T]
    position_ids = torch.zeros(shape, dtype=torch.long)  # [B,T]
    for b, row in enumerate(rows):
        at = 0
        for example in row:
            span = slice(at, at + len(example.input_ids))
            input_ids[b, span] = example.input_ids
            labels[b, span] = example.labels
            loss_weights[b, span] = weigh(example.labels, loss_weight)
            position_ids[b, span] = example.position_ids
            at = span.stop
        position_ids[b, at:] = torch.arange(num_columns - at) % PADDING
    order = [example for row in rows for example in row]
    views = [view for example in order for view in example.views]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        loss_weights=loss_weights,
        position_ids=position_ids,
        images=Grids.stack(views) if views else None,
        sample_ids=[example.id for example in order],
        num_visual_tokens=[example.num_visual_tokens for example in order],
        num_tokens=[len(example.input_ids) for example in order],
        sources=[example.source for example in order],
        num_padding=len(rows) * num_columns - sum(lengths),
        skipped=list(skipped),
    )
