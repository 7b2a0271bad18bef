"""One call of the sampler, from prompts that wait to answers that are over.

At most so many answers are in flight; where some have ended, the next begin, so that a long one holds nobody up. Each
turn is one forward: a prefill of waiting prompts, packed into one row, or a step, one more token for every answer.

Shapes: R rows, one an answer in flight; D width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from step3vl.generation.cache import Answer, SharedCache
from step3vl.generation.ranks import Ranks
from step3vl.generation.shelves import Stretch
from step3vl.generation.stopping import StopRule, StopTexts
from step3vl.models.vlm import VisionLanguageModel
from step3vl.types import IGNORE_INDEX, Batch, Example, Grids

PREFILL_TOKENS = 2**14
"""Most tokens of prompts in one prefill, unless a single one is longer."""
REFILL_SHARE = 8
"""A prefill waits until one in so many of the places in flight is free."""


@dataclass(eq=False, slots=True, kw_only=True)
class Question(Stretch):
    """A prompt, and the answers to it that have not begun."""

    example: Example
    waiting: deque[Spoken] = field(default_factory=deque)
    num_in_flight: int = 0
    hidden: Tensor | None = None  # [D] of its last token, once it was prefilled


@dataclass(eq=False, slots=True, kw_only=True)
class Spoken(Answer):
    """An answer: what it has said so far."""

    prompt: Question
    key: int
    """Name of its random numbers."""
    num_begun: int
    """Tokens that it had before."""
    watch: StopTexts | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    """What the watch has let through."""

    def hear(self, token: int, logprob: float, rule: StopRule) -> None:
        """Take the next token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.watch is not None and token not in rule.stop_ids:
            self.text += self.watch.feed(token)

    def is_over(self, rule: StopRule) -> bool:
        is_found = self.watch is not None and self.watch.found
        return self.ids[-1] in rule.stop_ids or is_found or len(self.ids) == rule.max_new_tokens


class Flight:
    """Brings all questions' answers to their ends.

    Args:
        vlm: the model.
        ranks: those that share its parameters.
        questions: with their answers waiting.
        rule: when an answer is over.
        choose: hidden states [R,D] and their answers -> next token of each, and its log-probability.
        batch_size: most answers in flight.
        max_cached_tokens: most tokens of prompts and answers to keep keys and values of; None: no limit.
        pad_id: a token for ranks that have nothing to do.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        ranks: Ranks,
        questions: Sequence[Question],
        rule: StopRule,
        choose: Callable[[Tensor, Sequence[Spoken]], tuple[list[int], list[float]]],
        batch_size: int,
        max_cached_tokens: int | None,
        pad_id: int,
    ):
        self.vlm, self.ranks, self.rule, self.choose = vlm, ranks, rule, choose
        self.batch_size, self.max_cached_tokens, self.pad_id = batch_size, max_cached_tokens, pad_id
        self.queue = deque(questions)
        self.open: list[Question] = []
        """Prefilled, with answers that wait."""
        self.num_in_flight = 0
        self.num_reserved = 0
        """Tokens that prompts have, and answers in flight may come to have, in the cache."""
        self.device = next(vlm.parameters()).device
        self.cache = SharedCache(len(vlm.decoder.blocks()), self.device)

    def turns(self) -> Iterator[None]:
        """Turn after turn, until all answers are over; on ranks together, until those of all ranks are."""
        while True:
            if self._begin():
                yield
                continue
            arrivals = self._arrivals()
            sizes = {view.shape for question in arrivals for view in question.example.views}
            is_due = bool(arrivals) and self._is_due(arrivals)
            prefills, num_sizes, steps = self.ranks.largest(is_due, len(sizes), self.num_in_flight > 0)
            if prefills:
                self._prefill(arrivals, num_sizes)
            elif steps:
                self._step()
                yield
            else:
                return

    # ------------------------------------------------------------------------------------------------ entering

    def _begin(self) -> bool:
        """First tokens of answers whose prompts are prefilled and for which there is room; whether there were any."""
        entering: list[Spoken] = []
        for question in self.open:
            while question.waiting and self._has_room(self.rule.max_new_tokens, len(entering)):
                entering.append(question.waiting.popleft())
                question.num_in_flight += 1
                self.num_reserved += self.rule.max_new_tokens
        if not entering:
            return False
        self.open = [question for question in self.open if question.waiting]
        self.num_in_flight += len(entering)
        hidden = torch.stack([hidden_of(answer.prompt) for answer in entering])  # [R,D]
        self.cache.enter(self._hear(hidden, entering))
        return True

    def _has_room(self, num_tokens: int, num_entering: int) -> bool:
        is_within = self.max_cached_tokens is None or self.num_reserved + num_tokens <= self.max_cached_tokens
        return is_within and self.num_in_flight + num_entering < self.batch_size

    def _arrivals(self) -> list[Question]:
        """The next prompts for which there is room; an answer to each must have some, too."""
        found: list[Question] = []
        num_answers = num_tokens = num_reserved = 0
        for question in self.queue if not self.open else ():
            length = len(question.example.input_ids)
            num_reserved += length + self.rule.max_new_tokens
            if not self._has_room(num_reserved, num_answers):
                break
            if found and num_tokens + length > PREFILL_TOKENS:
                break
            found.append(question)
            num_tokens += length
            num_reserved += self.rule.max_new_tokens * (len(question.waiting) - 1)
            num_answers += len(question.waiting)
        return found

    def _is_due(self, arrivals: Sequence[Question]) -> bool:
        """Whether enough answers would begin, or none would go on meanwhile."""
        num_free = self.batch_size - self.num_in_flight
        return not self.num_in_flight or num_free * REFILL_SHARE >= self.batch_size or len(arrivals) == len(self.queue)

    # ------------------------------------------------------------------------------------------------ forwards

    def _prefill(self, questions: Sequence[Question], num_sizes: int) -> None:
        """Keys and values of prompts, end to end in one row; ranks together run the encoder for so many sizes."""
        with encoder_passes(self.vlm, None if self.ranks.is_alone else num_sizes):
            if not questions:
                self._idle()
                return
            for question in questions:
                question.length = len(question.example.input_ids)
                self.num_reserved += question.length
            batch = packed([question.example for question in questions]).to(self.device)
            hidden = self.vlm(batch, cache=self.cache.tape(questions))[0]  # [T,D]
        ends = torch.tensor([question.length for question in questions]).cumsum(0) - 1
        for question, last in zip(questions, hidden[ends.to(self.device)].unbind(0)):
            question.hidden = last
            question.example.views = []  # seen
            self.open.append(self.queue.popleft())

    def _step(self) -> None:
        """One more token of every answer in flight."""
        if not self.num_in_flight:
            with encoder_passes(self.vlm, None):
                self._idle()
            return
        answers = [answer for answer in self.cache.begin_step() if isinstance(answer, Spoken)]
        numbers = torch.tensor(
            [[answer.ids[-1] for answer in answers], [answer.prompt.length + answer.length for answer in answers]]
        ).to(self.device)[..., None]  # [2,R,1]
        hidden = self.vlm(untaught(*numbers), cache=self.cache)[:, -1]  # [R,D]
        self.cache.end_step()
        self._hear(hidden, answers)

    def _idle(self) -> None:
        """A forward for the other ranks' sake."""
        ids = torch.full((1, 1), self.pad_id, device=self.device)
        self.vlm(untaught(ids, torch.zeros_like(ids)))

    def _hear(self, hidden: Tensor, answers: Sequence[Spoken]) -> list[Spoken]:
        """Give each answer its next token, and forget those that are over; returns the others."""
        for answer, token, logprob in zip(answers, *self.choose(hidden, answers)):
            answer.hear(token, logprob, self.rule)
        over = [answer for answer in answers if answer.is_over(self.rule)]
        left: list[Stretch] = [*over]
        for answer in over:
            question = answer.prompt
            question.num_in_flight -= 1
            self.num_reserved -= self.rule.max_new_tokens
            if not question.num_in_flight and not question.waiting:
                left.append(question)
                self.num_reserved -= question.length
        self.num_in_flight -= len(over)
        self.cache.leave(left)
        gone = set(over)
        return [answer for answer in answers if answer not in gone]


@contextmanager
def encoder_passes(vlm: VisionLanguageModel, num_passes: int | None) -> Iterator[None]:
    """How often the encoder runs inside for packed rows, whatever is set for training."""
    before, vlm.num_encoder_passes = vlm.num_encoder_passes, num_passes
    try:
        yield
    finally:
        vlm.num_encoder_passes = before


def hidden_of(question: Question) -> Tensor:
    """Hidden state [D] of a prompt's last token."""
    if question.hidden is None:
        raise ValueError(f"prompt {question.example.id} was not prefilled")
    return question.hidden


def packed(examples: Sequence[Example]) -> Batch:
    """Examples end to end in one row [1,T]; the positions of each begin at 0."""
    ids = torch.cat([example.input_ids for example in examples])
    positions = torch.cat([torch.arange(len(example.input_ids)) for example in examples])
    batch = untaught(ids[None], positions[None])
    views = [view for example in examples for view in example.views]
    batch.images = Grids.stack(views) if views else None
    batch.sample_ids = [example.id for example in examples]
    batch.num_visual_tokens = [example.num_visual_tokens for example in examples]
    return batch


def untaught(ids: Tensor, position_ids: Tensor) -> Batch:
    """A batch that teaches nothing."""
    weights = torch.zeros(ids.shape, device=ids.device)
    return Batch(
        input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), loss_weights=weights, position_ids=position_ids
    )
