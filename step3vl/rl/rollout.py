"""What reinforcement learning moves around: rollouts, groups of them, and packs of them that a model can take.

A rollout is one response with its score. Its tensors are one number a response token, kept in main memory until a pack
is made. A group holds the responses to one prompt, and is never split over ranks; a pack never splits a response.

Shapes: n tokens of a response, N of all responses in a pack, T tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from step3vl.data.collate import collate_rows
from step3vl.evaluation import Case
from step3vl.rewards import Score
from step3vl.types import IGNORE_INDEX, Batch, Completion, Example, Grids, Prompt, Sample

MAX_SHARED_TOKENS = 8192
"""Longest document with branches: its mask has the square of so many entries."""


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One response to one prompt."""

    prompt: Prompt  # as sent; the case's own may differ (Rephrased)
    case: Case
    example: Example  # the prompt, encoded
    source: str  # name of the mixture's source
    group: int  # number of the prompt among this rank's
    completion: Completion
    score: Score
    ids: Tensor  # [n] long, the response; its end token is part of it unless it was cut short
    engine_logp: Tensor  # [n], told by the engine that generated; NaN where it told none
    sample: Sample | None = None  # that the case was made of
    old_logp: Tensor | None = None  # [n], of the policy when the iteration began
    ref_logp: Tensor | None = None  # [n], of the reference
    values: Tensor | None = None  # [n], of the critic when the iteration began
    advantages: Tensor | None = None  # [n]
    returns: Tensor | None = None  # [n], NaN: cannot be judged


@dataclass(slots=True)
class Pack:
    """One packed row, as a batch, and the rollouts in it, in its order."""

    batch: Batch
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def sequence(self) -> Tensor:
        """[N] long: the response, 0 to S - 1, of each of the row's response tokens."""
        lengths = torch.tensor([len(rollout.ids) for rollout in self.rollouts], dtype=torch.long)
        return torch.arange(len(self.rollouts)).repeat_interleave(lengths)

    def gather(self, name: str) -> Tensor:
        """[N] fp32: a field of the rollouts, end to end."""
        parts = [getattr(rollout, name) for rollout in self.rollouts]
        return torch.cat(parts).float() if parts else torch.zeros(0)

    def scatter(self, name: str, values: Tensor) -> None:
        """Give each rollout its part of values [N]."""
        parts = values.detach().float().cpu().split([len(rollout.ids) for rollout in self.rollouts])
        for rollout, part in zip(self.rollouts, parts if self.rollouts else ()):
            setattr(rollout, name, part)

    def to(self, device: torch.device) -> Pack:
        return Pack(self.batch.to(device), self.rollouts)


Document = list[Rollout]
"""Rollouts that share their prompt's tokens, each a branch; or one rollout by itself."""


def packs(
    rollouts: Sequence[Rollout], max_tokens: int, pad_id: int, num_packs: int = 0, share: bool = True
) -> list[Pack]:
    """Packs of at most `max_tokens` tokens, in the order given; at least `num_packs`, the last ones without rollouts.

    Args:
        rollouts: those of a group side by side.
        max_tokens: of a pack.
        pad_id: fills rows up.
        num_packs: least number of packs.
        share: rollouts of a group share the tokens of their prompt where that saves work (`documents`).

    Raises:
        ValueError: a rollout is longer than a pack.
    """
    rows: list[list[Document]] = []
    room = 0
    for document in documents(rollouts, max_tokens, share):
        num_tokens = length(document)
        if num_tokens > max_tokens:
            raise ValueError(
                f"{document[0].case.id}: prompt and response have {num_tokens} tokens and model.pack_tokens is "
                f"{max_tokens}; raise it, or lower data.max_prompt_tokens or model.rollout.max_new_tokens"
            )
        if num_tokens > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(document)
        room -= num_tokens
    rows += [[] for _ in range(num_packs - len(rows))]
    return [Pack(_batch(row, max_tokens, pad_id), [r for document in row for r in document]) for row in rows]


def documents(rollouts: Sequence[Rollout], max_tokens: int, share: bool) -> list[Document]:
    """Rollouts by document: those of a group together, where that saves at least as many tokens as it holds.

    With masks, attention in a shared document computes every pair of its tokens: long responses are better off alone.
    """
    most = min(max_tokens, MAX_SHARED_TOKENS)
    whole: dict[int, Document] = {}
    for rollout in rollouts:
        whole.setdefault(rollout.group, []).append(rollout)
    found: list[Document] = []
    for rollout in rollouts:
        mate = found[-1] if found else None
        if share and mate is not None and mate[0].group == rollout.group and len(rollout.example.input_ids) > 1:
            together = [*mate, rollout]
            if length(together) <= most and any(_pays(document) for document in (together, whole[rollout.group])):
                mate.append(rollout)
                continue
        found.append([rollout])
    return found


def _pays(document: Document) -> bool:
    saved = (len(document) - 1) * (len(document[0].example.input_ids) - 1)
    return sum(len(rollout.ids) for rollout in document) <= 2 * saved


def length(document: Document) -> int:
    """Tokens of a document: the prompt but its last token, and each response behind that one, but its own last."""
    return len(document[0].example.input_ids) - 1 + sum(len(rollout.ids) for rollout in document)


def _batch(row: Sequence[Document], max_tokens: int, pad_id: int) -> Batch:
    batch = collate_rows([[_example(document) for document in row]], max_tokens, pad_id=pad_id)
    if any(len(document) > 1 for document in row):
        batch.branches = torch.zeros_like(batch.position_ids)
        at = 0
        for document in row:
            at += len(document[0].example.input_ids) - 1
            for number, rollout in enumerate(document, 1):
                batch.branches[0, at : at + len(rollout.ids)] = number if len(document) > 1 else 0
                at += len(rollout.ids)
    views: list[Tensor] = []
    numbers: dict[int, range] = {}  # of the views of a group
    for document in row:
        first = document[0]
        if first.group not in numbers:
            numbers[first.group] = range(len(views), len(views) + len(first.example.views))
            views += first.example.views
    if views:
        own = Grids.stack(views)
        order = [k for document in row for k in numbers[document[0].group]]
        batch.images = Grids(own.tensors, own.order[torch.tensor(order)])
    return batch


def _example(document: Document) -> Example:
    """A document as one example; every branch begins with the prompt's last token, which predicts its first."""
    prompt = document[0].example
    shared = len(prompt.input_ids) - 1
    ids, labels, places = [prompt.input_ids[:-1]], [torch.full((shared,), IGNORE_INDEX)], [torch.arange(shared)]
    for rollout in document:
        ids += [prompt.input_ids[-1:], rollout.ids[:-1]]
        labels.append(rollout.ids)
        places.append(torch.arange(shared, shared + len(rollout.ids)))
    return Example(
        id=prompt.id,
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        position_ids=torch.cat(places),
        num_visual_tokens=prompt.num_visual_tokens,
        source=document[0].source,
    )
