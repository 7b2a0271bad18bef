"""Generation: prompts in, completions out, greedy or by temperature, with the log-probability of every token.

Images are encoded and prompts prefilled once, and their keys and values kept once, however many completions are asked
for. What comes out depends on no batch size: greedy, and drawn, where each sequence has random numbers of its own.
STEP3-VL uses such sampling for evaluation and rollouts.

Shapes: R rows, one a sequence in flight; D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from step3vl.generation.flight import Flight, Question, Spoken
from step3vl.generation.logits import draw, log_probabilities, probabilities, scaled_logits
from step3vl.generation.randomness import stream_key, uniforms
from step3vl.generation.ranks import Ranks
from step3vl.generation.stopping import StopRule, StopTexts
from step3vl.models.vlm import VisionLanguageModel
from step3vl.types import Completion, Example, Prompt, Sampling


class PromptEncoder(Protocol):
    """What the sampler needs of a processor."""

    pad_id: int
    """Stands where there is no prompt."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids that end an answer."""

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Sampler:
    """Answers prompts with a vision-language model; a `step3vl.types.Generator`.

    Ranks that share the model's parameters must call it equally often; their prompts may differ in number.

    Args:
        vlm: the model; it is put into evaluation mode while generating, then back.
        processor: turns prompts into token ids and token ids into text.
        batch_size: most sequences in flight at once; where one ends, the next begins.
        seed: seed of the random numbers of all calls whose `Sampling.seed` is None; each call has its own. Ranks that
            get the same prompts need different ones.
        max_cached_tokens: most tokens to keep keys and values of; a sequence begins when it, at its full length, has
            room. None: `batch_size` is the only limit.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        processor: PromptEncoder,
        batch_size: int = 64,
        seed: int = 0,
        max_cached_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted is 1 or more")
        self.vlm = vlm
        self.processor = processor
        self.batch_size = batch_size
        self.seed = seed
        self.max_cached_tokens = max_cached_tokens
        self.num_calls = 0
        """Calls so far without a seed of their own."""

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to draw the same numbers."""
        return {"seed": self.seed, "num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.seed, self.num_calls = int(state["seed"]), int(state["num_calls"])

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in the order of the prompts.

        Raises:
            ValueError: `n` or a field of `sampling` is out of range, a prompt is empty or cannot be kept, or tokens are
                drawn from logits that are not finite.
        """
        if n < 1:
            raise ValueError(f"n is {n}; accepted is 1 or more")
        rule = StopRule.of(self.processor.stop_ids, sampling.max_new_tokens, sampling.stop)
        answers = self._prepare(prompts, sampling, rule, n)
        flight = self._flight(answers, sampling, rule)
        with evaluating(self.vlm), without_gradients(flight.ranks):
            for _ in flight.turns():
                pass
        return [[self._completion(answer, rule) for answer in group] for group in answers]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, Completion]:
        """One completion as it is made: pieces of text, never half a character, that add up to `Completion.text`.

        The completion is the iterator's return value. The model is in evaluation mode until the iterator ends or is
        closed. Raises ValueError as `generate` does.
        """
        rule = StopRule.of(self.processor.stop_ids, sampling.max_new_tokens, sampling.stop)
        ((answer,),) = self._prepare([prompt], sampling, rule, 1)
        answer.watch = answer.watch or StopTexts(self.processor.decode, ())
        return self._stream(answer, answer.watch, sampling, rule)

    def _stream(
        self, answer: Spoken, watch: StopTexts, sampling: Sampling, rule: StopRule
    ) -> Generator[str, None, Completion]:
        num_shown = 0
        with evaluating(self.vlm):
            flight = self._flight([[answer]], sampling, rule)
            turns = flight.turns()
            while not answer.ids or not answer.is_over(rule):
                with without_gradients(flight.ranks):  # not while others run, between two pieces
                    next(turns)
                if piece := answer.text[num_shown:]:
                    num_shown = len(answer.text)
                    yield piece
            with without_gradients(flight.ranks):
                for _ in turns:  # of ranks that have not ended
                    pass
        if rest := watch.rest():
            answer.text += rest
            yield rest
        return self._completion(answer, rule)

    def _prepare(self, prompts: Sequence[Prompt], sampling: Sampling, rule: StopRule, n: int) -> list[list[Spoken]]:
        """`n` answers to each prompt, not begun; every mistake of the caller is found here."""
        check(sampling)
        examples = [self._encode(prompt, k, rule) for k, prompt in enumerate(prompts)]
        seed, call = (self.seed, self.num_calls) if sampling.seed is None else (sampling.seed, 0)
        self.num_calls += sampling.seed is None
        answers = []
        for k, (prompt, example) in enumerate(zip(prompts, examples)):
            question = Question(example=example)
            for number in range(n):
                watch = StopTexts(self.processor.decode, rule.stop, prompt.begun_ids) if rule.stop else None
                key, num_begun = stream_key(seed, call, k, number), len(prompt.begun_ids)
                question.waiting.append(Spoken(prompt=question, key=key, num_begun=num_begun, watch=watch))
            answers.append(list(question.waiting))
        return answers

    def _encode(self, prompt: Prompt, number: int, rule: StopRule) -> Example:
        example = self.processor.encode_prompt(prompt, id=str(number))
        if not len(example.input_ids):
            raise ValueError(f"prompt {number} is empty: there is nothing to continue")
        for id in prompt.begun_ids:
            if not 0 <= id < self.vlm.decoder.vocab_size or id == self.vlm.image_token_id:
                raise ValueError(
                    f"prompt {number}: begun_ids has {id}; accepted are ids from 0 to "
                    f"{self.vlm.decoder.vocab_size - 1}, but for the image placeholder {self.vlm.image_token_id}"
                )
        if prompt.begun_ids:
            example.input_ids = torch.cat([example.input_ids, torch.tensor(prompt.begun_ids)])
        num_tokens = len(example.input_ids) + rule.max_new_tokens
        if self.max_cached_tokens is not None and num_tokens > self.max_cached_tokens:
            raise ValueError(
                f"prompt {number} has {len(example.input_ids)} tokens and may get {rule.max_new_tokens} more, but "
                f"max_cached_tokens is {self.max_cached_tokens}; accepted is {num_tokens} or more"
            )
        return example

    def _flight(self, answers: Sequence[Sequence[Spoken]], sampling: Sampling, rule: StopRule) -> Flight:
        return Flight(
            self.vlm,
            Ranks(self.vlm),
            [group[0].prompt for group in answers],
            rule,
            lambda hidden, rows: self._choose(hidden, rows, sampling),
            self.batch_size,
            self.max_cached_tokens,
            self.processor.pad_id,
        )

    def _choose(self, hidden: Tensor, answers: Sequence[Spoken], sampling: Sampling) -> tuple[list[int], list[float]]:
        """The next token of each row, and its log-probability. An image placeholder is never said."""
        logits = scaled_logits(hidden, self.vlm.decoder.lm_head, sampling.temperature, self.vlm.image_token_id)  # [R,V]
        if sampling.temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            steps = [answer.num_begun + len(answer.ids) for answer in answers]
            uniform = uniforms([answer.key for answer in answers], steps).to(logits.device)
            token = draw(probabilities(logits, sampling.top_p, sampling.top_k), uniform)
        logprobs = log_probabilities(logits, token).tolist()
        if sampling.temperature > 0 and not all(map(math.isfinite, logprobs)):
            wrong = next(k for k, logprob in enumerate(logprobs) if not math.isfinite(logprob))
            raise ValueError(
                f"prompt {answers[wrong].prompt.example.id}: a drawn token has the log-probability {logprobs[wrong]}; "
                "accepted are finite logits"
            )
        return token.tolist(), logprobs

    def _completion(self, answer: Spoken, rule: StopRule) -> Completion:
        spoken, is_truncated = rule.cut(answer.ids)
        if answer.watch is None:
            text = self.processor.decode(spoken)
        else:
            text = answer.text + answer.watch.rest()
            is_truncated = is_truncated and not answer.watch.found
        return Completion(
            text=text,
            token_ids=answer.ids,
            truncated=is_truncated,
            num_tokens=len(answer.ids),
            logprobs=answer.logprobs,
        )


def check(sampling: Sampling) -> None:
    """Raises ValueError for what cannot be sampled with. At temperature 0 top_p and top_k change nothing."""
    if sampling.temperature < 0:
        raise ValueError(f"temperature is {sampling.temperature}; accepted is 0 (greedy) or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}; accepted is above 0, up to 1 (all tokens)")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"top_k is {sampling.top_k}; accepted is 1 or more, or None (all tokens)")


def without_gradients(ranks: Ranks) -> AbstractContextManager:
    """Inference mode, but for shards: what FSDP2 gathers first in inference mode cannot be used outside of it."""
    return torch.no_grad() if ranks.is_sharded else torch.inference_mode()


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every part is back in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
