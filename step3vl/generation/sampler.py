"""Generation with a key-value cache: batched prefill, one token a step, greedy or by temperature.

Images are encoded and prompts prefilled once, however many completions are asked for. The same tokens come out with or
without cache, alone or in a batch (greedy). STEP3-VL uses such sampling for evaluation and rollouts.

Shapes: R rows of a batch, T tokens of the longest prompt, K tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from step3vl.generation.stopping import StopRule
from step3vl.generation.streaming import TextStream
from step3vl.models.vlm import VisionLanguageModel
from step3vl.types import IGNORE_INDEX, Batch, Completion, Example, Grids, Prompt, Sampling


class PromptEncoder(Protocol):
    """What the sampler needs of a processor."""

    pad_id: int
    """Fills the left of shorter prompts."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Ids that end an answer."""

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Sampler:
    """Answers prompts with a vision-language model; a `step3vl.types.Generator`.

    Args:
        vlm: the model; it is put into evaluation mode while generating, then back.
        processor: turns prompts into token ids and token ids into text.
        batch_size: most sequences in flight at once.
        seed: seed of the random numbers, which continue from call to call, unless `Sampling.seed` is given.
    """

    def __init__(self, vlm: VisionLanguageModel, processor: PromptEncoder, batch_size: int = 64, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted is 1 or more")
        self.vlm = vlm
        self.processor = processor
        self.batch_size = batch_size
        self.seed = seed
        self._random: torch.Generator | None = None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in the order of the prompts.

        Raises:
            ValueError: `n` or `max_new_tokens` is below 1, the temperature is negative, or a prompt is empty.
        """
        if n < 1:
            raise ValueError(f"n is {n}; accepted is 1 or more")
        rule, examples = self._prepare(prompts, sampling)
        by_length = sorted(range(len(examples)), key=lambda k: len(examples[k].input_ids))
        group_size = max(1, self.batch_size // n)
        completions: list[list[Completion]] = [[] for _ in examples]
        with without_gradients(self.vlm), evaluating(self.vlm):
            for start in range(0, len(by_length), group_size):
                members = by_length[start : start + group_size]
                sequences = self._complete([examples[k] for k in members], rule, sampling.temperature, n)
                for row, ids in enumerate(sequences):
                    completions[members[row // n]].append(self._completion(ids, rule))
        return completions

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, Completion]:
        """One completion as it is made: pieces of text, never half a character, that add up to `Completion.text`.

        The completion is the iterator's return value. The model is in evaluation mode until the iterator ends or is
        closed. Raises ValueError as `generate` does.
        """
        rule, examples = self._prepare([prompt], sampling)
        return self._stream(examples[0], rule, sampling.temperature)

    @torch.inference_mode()
    def _stream(self, example: Example, rule: StopRule, temperature: float) -> Generator[str, None, Completion]:
        text = TextStream(self.processor.decode)
        ids: list[int] = []
        with evaluating(self.vlm):
            for _, tokens in self._steps([example], rule, temperature, 1):
                ids += tokens
                piece = "" if tokens[0] in rule.stop_ids else text.feed(tokens[0])
                if piece:
                    yield piece
        if rest := text.rest():
            yield rest
        return self._completion(ids, rule)

    def _prepare(self, prompts: Sequence[Prompt], sampling: Sampling) -> tuple[StopRule, list[Example]]:
        """When to stop, and the prompts as tokens; every mistake of the caller is found here."""
        if sampling.temperature < 0:
            raise ValueError(f"temperature is {sampling.temperature}; accepted is 0 (greedy) or more")
        if sampling.seed is not None:
            self.seed, self._random = sampling.seed, None
        rule = StopRule.of(self.processor.stop_ids, sampling.max_new_tokens)
        examples = [self.processor.encode_prompt(prompt, id=str(k)) for k, prompt in enumerate(prompts)]
        for k, example in enumerate(examples):
            if not len(example.input_ids):
                raise ValueError(f"prompt {k} is empty: there is nothing to continue")
        return rule, examples

    def _completion(self, ids: list[int], rule: StopRule) -> Completion:
        spoken, truncated = rule.cut(ids)
        return Completion(text=self.processor.decode(spoken), token_ids=ids, truncated=truncated, num_tokens=len(ids))

    def _complete(self, examples: list[Example], rule: StopRule, temperature: float, n: int) -> list[list[int]]:
        """Token ids of n continuations of each example, the continuations of one example side by side."""
        sequences: list[list[int]] = [[] for _ in range(len(examples) * n)]
        for rows, tokens in self._steps(examples, rule, temperature, n):
            for row, token in zip(rows, tokens):
                sequences[row].append(token)
        return sequences

    def _steps(
        self, examples: list[Example], rule: StopRule, temperature: float, n: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Step by step, the sequences still in flight and the token that each of them gets."""
        from transformers import DynamicCache

        device = next(self.vlm.parameters()).device
        cache = DynamicCache()
        batch, mask = left_padded(examples, self.processor.pad_id)
        batch, mask = batch.to(device), mask.to(device)
        hidden = self.vlm(batch, cache=cache, attention_mask=mask)[:, -1]  # [R,D]
        position = batch.position_ids[:, -1]
        if n > 1:
            cache.batch_repeat_interleave(n)
            hidden, mask, position = (x.repeat_interleave(n, dim=0) for x in (hidden, mask, position))
        rows = torch.arange(len(hidden), device=device)  # which sequence each row in flight belongs to
        for step in range(1, rule.max_new_tokens + 1):
            token = self._choose(hidden, temperature)  # [R]
            yield rows.tolist(), token.tolist()
            alive = ~rule.stops(token)
            if step == rule.max_new_tokens or not alive.any():
                return
            if not alive.all():
                cache.batch_select_indices(alive.nonzero().squeeze(1))
                rows, token, mask, position = rows[alive], token[alive], mask[alive], position[alive]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # [R,K+1]
            position = position + 1
            hidden = self.vlm(_batch(token[:, None], position[:, None]), cache=cache, attention_mask=mask)[:, -1]

    def _choose(self, hidden: Tensor, temperature: float) -> Tensor:
        """The next token of each row [R] from hidden states [R,D]. An image placeholder is never said."""
        logits = self.vlm.decoder.lm_head(hidden).float()  # [R,V]
        if self.vlm.image_token_id is not None:
            logits[:, self.vlm.image_token_id] = float("-inf")
        if temperature == 0:
            return logits.argmax(dim=-1)
        if self._random is None or self._random.device != logits.device:
            self._random = torch.Generator(logits.device).manual_seed(self.seed)
        return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=self._random).squeeze(1)


def without_gradients(module: torch.nn.Module) -> AbstractContextManager:
    """Inference mode, but for shards: what FSDP2 gathers first in inference mode cannot be used outside of it."""
    is_sharded = any(isinstance(parameter, DTensor) for parameter in module.parameters())
    return torch.no_grad() if is_sharded else torch.inference_mode()


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


def left_padded(examples: Sequence[Example], pad_id: int) -> tuple[Batch, Tensor]:
    """One example a row, padded on the left, and the mask [R,T] that is True at real tokens. Positions start at 0."""
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, longest - len(example.input_ids) :] = example.input_ids
        mask[row, longest - len(example.input_ids) :] = True
    views = [view for example in examples for view in example.views]
    batch = _batch(ids, (mask.cumsum(1) - 1).clamp_min(0))
    batch.images = Grids.stack(views) if views else None
    batch.sample_ids = [example.id for example in examples]
    batch.num_visual_tokens = [example.num_visual_tokens for example in examples]
    return batch, mask


def _batch(ids: Tensor, position_ids: Tensor) -> Batch:
    """A batch that teaches nothing."""
    weights = torch.zeros(ids.shape, device=ids.device)
    return Batch(
        input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), loss_weights=weights, position_ids=position_ids
    )
