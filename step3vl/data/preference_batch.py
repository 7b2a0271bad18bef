"""Preferences to packed batches: both answers of a pair in one forward, and where their scores are read.

Two answers to one question differ in their answers alone. So the images of a pair go through the encoder once, and
where that saves work both answers are branches behind the same prompt tokens; the scores are the same either way.

Shapes: P pairs, B rows, T tokens a row, t tokens of one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from step3vl.data.collate import collate_rows, short_rows
from step3vl.data.preferences import Preference
from step3vl.data.processor import Processor
from step3vl.types import IGNORE_INDEX, Batch, Example, Grids, Message, Sample

MAX_SHARED_TOKENS = 8192
"""Longest document with branches: its mask has the square of so many entries."""


@dataclass(slots=True, kw_only=True)
class PreferenceBatch(Batch):
    """Packed rows with both answers of every pair. The end token of an answer carries the one label of its answer."""

    ends: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.long))
    """[P,2] long: where the end tokens of chosen and rejected stand in the rows, laid end to end."""
    margins: Tensor = field(default_factory=lambda: torch.zeros(0))  # [P]; 0 where a pair says none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in values.items()}
        return PreferenceBatch(**moved)


def encode_answer(
    processor: Processor, messages: Sequence[Message], images: Sequence[Image.Image], id: str, max_tokens: int
) -> Example:
    """A conversation up to the token that ends its last answer, where its score is read; nothing else is labelled.

    Raises ValueError for one that is longer than `max_tokens` or cannot be encoded.
    """
    sample = Sample(id=id, domain="", subset="", level=0, messages=list(messages), images=list(images))
    found = processor.encode(sample)
    last = int((found.labels != IGNORE_INDEX).nonzero().max())  # predicts the end token
    end = last + 1
    if end >= max_tokens:
        raise ValueError(f"its conversation with an answer has {end + 1} tokens and at most {max_tokens} fit a row")
    labels = torch.full((end + 1,), IGNORE_INDEX, dtype=torch.long)  # [t]
    labels[end] = found.labels[last]
    return Example(
        id=found.id,
        input_ids=found.input_ids[: end + 1],
        labels=labels,
        position_ids=found.position_ids[: end + 1],
        views=found.views,
        num_visual_tokens=found.num_visual_tokens,
    )


@dataclass(slots=True, kw_only=True)
class Pair:
    """Both answers of a preference, encoded, and how many tokens they begin with alike."""

    chosen: Example
    rejected: Example
    margin: float
    num_shared: int

    @property
    def is_shared(self) -> bool:
        """Whether sharing saves at least as many tokens as the branches hold, which attend to every pair of tokens."""
        rest = len(self.chosen.input_ids) + len(self.rejected.input_ids) - 2 * self.num_shared
        return rest <= 2 * self.num_shared and self.num_shared + rest <= MAX_SHARED_TOKENS


def encode_pair(processor: Processor, sample: Preference, max_tokens: int) -> Pair:
    """Both answers of a preference. Raises ValueError for a pair whose answers do not fit."""
    texts = (sample.chosen, sample.rejected)
    chosen, rejected = (
        encode_answer(processor, sample.answered(text), sample.images, sample.id, max_tokens) for text in texts
    )
    least = min(len(chosen.input_ids), len(rejected.input_ids)) - 1  # each branch keeps its end token
    differ = (chosen.input_ids[:least] != rejected.input_ids[:least]).nonzero()
    num_shared = int(differ[0]) if len(differ) else least
    return Pair(chosen=chosen, rejected=rejected, margin=sample.margin or 0.0, num_shared=num_shared)


def collate_pairs(
    pairs: Sequence[Pair], seq_len: int, pad_id: int = 0, skipped: Sequence[str] = (), share: bool = True
) -> PreferenceBatch:
    """Pairs in the fewest rows of at most `seq_len` tokens that first-fit needs; images of a pair are held once."""
    documents: list[tuple[Example, int, list[int], int]] = []  # document, pair, where its answers end, tokens shared
    for number, pair in enumerate(pairs):
        joined = _joined(pair) if share and pair.is_shared else None
        if joined is not None and len(joined.input_ids) <= seq_len:
            first = len(pair.chosen.input_ids)
            documents.append((joined, number, [first - 1, len(joined.input_ids) - 1], pair.num_shared))
        else:
            documents += [(one, number, [len(one.input_ids) - 1], 0) for one in (pair.chosen, pair.rejected)]
    rows = short_rows([len(document.input_ids) for document, *_ in documents], seq_len)
    order = [k for row in rows for k in row]
    bare = [[_without_views(documents[k][0]) for k in row] for row in rows]
    batch = collate_rows(bare, seq_len, pad_id=pad_id, skipped=skipped)
    num_columns = batch.input_ids.shape[1]
    ends: list[list[int]] = [[] for _ in pairs]
    branches = torch.zeros_like(batch.position_ids)  # [B,T]
    places: dict[int, int] = {}
    for b, row in enumerate(rows):
        at = 0
        for k in row:
            places[k] = b * num_columns + at
            document, _, stops, num_shared = documents[k]
            if len(stops) > 1:
                branches[b, at + num_shared : at + stops[0] + 1] = 1
                branches[b, at + stops[0] + 1 : at + stops[1] + 1] = 2
            at += len(document.input_ids)
    for k, (_, number, stops, _) in enumerate(documents):  # chosen comes before rejected
        ends[number] += [places[k] + stop for stop in stops]
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    values |= {
        "images": _images(pairs, [documents[k][1] for k in order]),
        "branches": branches if bool(branches.any()) else None,
    }
    return PreferenceBatch(
        **values,
        ends=torch.tensor(ends, dtype=torch.long).reshape(-1, 2),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
    )


def _joined(pair: Pair) -> Example:
    """Both answers behind the tokens that they share."""
    one, two, shared = pair.chosen, pair.rejected, pair.num_shared
    return Example(
        id=one.id,
        input_ids=torch.cat([one.input_ids, two.input_ids[shared:]]),
        labels=torch.cat([one.labels, two.labels[shared:]]),
        position_ids=torch.cat([one.position_ids, two.position_ids[shared:]]),
        num_visual_tokens=one.num_visual_tokens,
        source=one.source,
    )


def _without_views(example: Example) -> Example:
    values = {f.name: getattr(example, f.name) for f in fields(example)}
    return Example(**(values | {"views": []}))


def _images(pairs: Sequence[Pair], order: Sequence[int]) -> Grids | None:
    """The views of all pairs, each held once; `order` is the pair of each document in reading order."""
    numbers: dict[int, range] = {}
    views: list[Tensor] = []
    for number, pair in enumerate(pairs):
        numbers[number] = range(len(views), len(views) + len(pair.chosen.views))
        views += pair.chosen.views
    if not views:
        return None
    own = Grids.stack(views)
    return Grids(own.tensors, own.order[torch.tensor([k for number in order for k in numbers[number]])])
