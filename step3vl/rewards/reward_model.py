"""A trained reward model as a reward: one forward an answer and no server (Bradley and Terry; not the report's judge).

`RewardModelStage` trains it from pairs of answers. It is a whole model of its own on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from step3vl.data.collate import collate_rows, short_rows
from step3vl.data.preference_batch import encode_answer
from step3vl.data.processor import Processor
from step3vl.models import ValueModel
from step3vl.parallel import Blueprint, has_no_memory
from step3vl.types import IGNORE_INDEX, Example, Message
from step3vl.weights import load_parts

from .base import Answered, positive

Scale = Literal["group", "sigmoid", "score"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RewardModel:
    """How much a reward model likes an answer. None for an answer that it cannot read: too long, or empty.

    Args:
        model: the scorer; its card is the one that it was trained with.
        processor: turns conversations into tokens, as in its training.
        init_from: the run of RewardModelStage, or its checkpoint; null: the weights that `model` has.
        scale: group: the estimated probability of being better than the other answers to the same prompt, mean over
            them, which a shift of all scores does not change; None for a single answer. sigmoid: of the score.
            score: the score itself, cut at `most`.
        most: bound of `score`, on both sides.
        max_tokens: of a conversation with its answer; also of a packed row.
        dtype: of the weights held, fp32 or bf16; the score is read in fp32 either way.
        device: cpu, cuda ...; null: cuda where there is one.
    """

    name = "reward_model"

    def __init__(
        self,
        model: ValueModel,
        processor: Processor,
        init_from: str | None,
        scale: Scale = "group",
        most: float = 10.0,
        max_tokens: int = 16384,
        dtype: Literal["fp32", "bf16"] = "fp32",
        device: str | None = None,
    ):
        if scale not in get_args(Scale):
            raise ValueError(f"RewardModel: scale is {scale!r}; accepted are {', '.join(get_args(Scale))}")
        if max_tokens < 2 or dtype not in DTYPES:
            raise ValueError(
                f"RewardModel needs max_tokens >= 2 and a dtype of {', '.join(DTYPES)}, got {max_tokens} and {dtype!r}"
            )
        self.model, self.processor, self.init_from = model.requires_grad_(False), processor, init_from
        self.scale, self.most, self.max_tokens = scale, positive("RewardModel: most", most), max_tokens
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bounds: tuple[float, float] = (-self.most, self.most) if scale == "score" else (0.0, 1.0)
        self.counts: Counter[str] = Counter()
        self.is_ready = False

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        scores = self.scores(rollouts)
        if self.scale == "group":
            return _against_others(rollouts, scores)
        if self.scale == "sigmoid":
            return [None if score is None else float(torch.tensor(score).sigmoid()) for score in scores]
        return [None if score is None else max(-self.most, min(self.most, score)) for score in scores]

    def scores(self, rollouts: Sequence[Answered]) -> list[float | None]:
        """Scores as they are. Answers are packed into rows, which changes no score."""
        self.prepare()
        found: list[float | None] = [None] * len(rollouts)
        examples: dict[int, Example] = {}
        for k, rollout in enumerate(rollouts):
            if rollout.completion.error is None and (example := self._encode(rollout)) is not None:
                examples[k] = example
        numbers = list(examples)
        rows = short_rows([len(examples[k].input_ids) for k in numbers], self.max_tokens)
        with torch.no_grad(), self._numbers():
            for row in rows:
                members = [numbers[i] for i in row]
                for k, score in zip(members, self._score([examples[k] for k in members]).tolist()):
                    found[k] = score
                    self.counts["scored"] += 1
        return found

    def prepare(self) -> None:
        """Memory and weights, once. Raises ValueError where `init_from` does not fit the model."""
        if self.is_ready:
            return
        vlm = self.model.vlm
        for parameter in self.model.parameters():  # not its buffers: frequencies of positions stay exact
            parameter.data = parameter.data.to(self.dtype)
        if has_no_memory(self.model):
            if self.init_from is None:
                raise ValueError("RewardModel: init_from is null, and the model has no weights; give a reward model")
            Blueprint(self.model, self.model.blocks()).fill(self.model, self.device, 0)
        self.model.to(self.device).eval()
        if self.init_from is not None:
            load_parts(vlm, self.init_from)
        self.processor.bind(vlm.image_spec, vlm.projector.grid)
        vlm.bind(self.processor.image_token_id)
        self.is_ready = True

    # ------------------------------------------------------------------------------------------------ inside

    def _encode(self, rollout: Answered) -> Example | None:
        if not rollout.text.strip():
            self.counts["empty"] += 1
            return None
        messages = [*rollout.prompt.messages, Message(role="assistant", content=rollout.text)]
        try:
            return encode_answer(self.processor, messages, rollout.prompt.images, rollout.case.id, self.max_tokens)
        except ValueError:
            self.counts["unreadable"] += 1
            return None

    def _score(self, examples: Sequence[Example]) -> Tensor:
        """[n] of the examples of one row."""
        batch = collate_rows([examples], self.max_tokens, pad_id=self.processor.pad_id).to(self.device)
        places = (batch.labels != IGNORE_INDEX).flatten().nonzero().squeeze(-1)  # [n], one an answer, in their order
        return self.model(batch, places).cpu()

    def _numbers(self) -> AbstractContextManager:
        """bf16 arithmetic on a GPU, and with bf16 weights; the scores themselves are fp32."""
        if self.device.type == "cuda" or self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def _against_others(rollouts: Sequence[Answered], scores: Sequence[float | None]) -> list[float | None]:
    """Mean probability of being better than the other answers to the same prompt of the same case."""
    groups: dict[tuple, list[int]] = {}
    for k, (rollout, score) in enumerate(zip(rollouts, scores)):
        if score is not None:
            turns = tuple((message.role, message.content) for message in rollout.prompt.messages)
            groups.setdefault((rollout.case.id, turns), []).append(k)
    values: list[float | None] = [None] * len(rollouts)
    for members in groups.values():
        if len(members) < 2:
            continue
        own = torch.tensor([scores[k] for k in members], dtype=torch.float64)  # [n]
        better = (own[:, None] - own[None, :]).sigmoid().fill_diagonal_(0.0).sum(1) / (len(members) - 1)  # [n]
        for k, value in zip(members, better.tolist()):
            values[k] = value
    return values
