"""Prompts to scored groups of rollouts: generate, continue what an earlier iteration left unfinished, and score.

Partial rollouts (PaCoRe's RLVR stage): an iteration generates a bounded number of tokens a response; a group with an
unfinished response waits, and goes on in the next iteration with the policy of then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from step3vl.data.mixture import Draw
from step3vl.data.processor import Processor
from step3vl.data.prompts import PromptBatch, PromptBatches, prompt_of
from step3vl.data.shuffle import mix
from step3vl.evaluation import Case
from step3vl.rewards import Answered, Rubric
from step3vl.types import Completion, Generator, Sample, Sampling

from .rollout import Rollout

MOST_SEED = 0x7FFFFFFF
"""Servers take seeds of 31 bits."""


@dataclass(slots=True, kw_only=True)
class Group:
    """The responses to one prompt, finished or not."""

    sample: Sample
    source: str
    draw: Draw
    parts: list[Completion] = field(default_factory=list)
    """What there is of each response; `truncated` where it is not finished."""
    num_waits: int = 0
    """Iterations that have passed since it was begun."""


class Collector:
    """Makes an iteration's rollouts.

    Args:
        processor: turns prompts into tokens, and texts of servers into tokens.
        rubric: scores responses.
        sampling: how to generate; max_new_tokens bounds a whole response.
        group_size: responses to a prompt.
        partial_tokens: tokens of a response that one iteration generates; None: all of it.
    """

    def __init__(
        self,
        processor: Processor,
        rubric: Rubric,
        sampling: Sampling,
        group_size: int,
        partial_tokens: int | None = None,
    ):
        if group_size < 1:
            raise ValueError(f"model.group_size is {group_size}; accepted is 1 or more")
        if sampling.temperature <= 0:
            raise ValueError(
                f"model.rollout.temperature is {sampling.temperature}; accepted is above 0, or all responses to a "
                "prompt are the same"
            )
        if partial_tokens is not None and not 1 <= partial_tokens <= sampling.max_new_tokens:
            raise ValueError(
                f"model.partial_tokens is {partial_tokens}; accepted is 1 to model.rollout.max_new_tokens, "
                f"{sampling.max_new_tokens}"
            )
        self.processor, self.rubric, self.sampling = processor, rubric, sampling
        self.group_size, self.partial_tokens = group_size, partial_tokens
        self.waiting: list[Group] = []
        self.seconds: dict[str, float] = {}
        """Wall time of the last iteration, by phase."""

    def collect(self, batch: PromptBatch, generator: Generator, seed: int) -> list[list[Rollout]]:
        """The scored groups that are finished now; those that are not wait for the next call."""
        start_s = time.perf_counter()
        new = [
            Group(sample=sample, source=source, draw=draw)
            for sample, source, draw in zip(batch.samples, batch.sources, batch.draws)
        ]
        groups = [*self.waiting, *new]
        self._generate(new, generator, seed)
        self._go_on(self.waiting, generator, mix(seed, 1))
        self.waiting = [group for group in groups if any(self._is_unfinished(part) for part in group.parts)]
        for group in self.waiting:
            group.num_waits += 1
        made_s = time.perf_counter()
        waiting = {id(group) for group in self.waiting}
        scored = self._score([group for group in groups if id(group) not in waiting])
        self.seconds = {"generate": made_s - start_s, "reward": time.perf_counter() - made_s}
        return scored

    # ------------------------------------------------------------------------------------------------ partial

    def state_dict(self) -> list[dict[str, Any]]:
        """The waiting groups as plain data; samples are named, not kept."""
        return [
            {
                "source": group.source,
                "draw": list(group.draw),
                "num_waits": group.num_waits,
                "parts": [[part.token_ids, part.logprobs, part.truncated] for part in group.parts],
            }
            for group in self.waiting
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]], batches: PromptBatches) -> None:
        """Go on with the groups of `state`, whose samples are read again."""
        self.waiting = []
        for saved in state:
            draw = (str(saved["draw"][0]), int(saved["draw"][1]))
            parts = [self._whole(ids, logprobs, truncated) for ids, logprobs, truncated in saved["parts"]]
            group = Group(sample=batches.read(draw), source=saved["source"], draw=draw, parts=parts)
            group.num_waits = int(saved["num_waits"])
            self.waiting.append(group)

    # ------------------------------------------------------------------------------------------------ inside

    def _generate(self, groups: Sequence[Group], generator: Generator, seed: int) -> None:
        sampling = replace(self.sampling, seed=seed, max_new_tokens=self._budget(0))
        found = generator.generate([prompt_of(group.sample) for group in groups], sampling, self.group_size)
        for group, completions in zip(groups, found, strict=True):
            if len(completions) != self.group_size:
                raise ValueError(
                    f"{type(generator).__name__} gave {len(completions)} completions of a prompt, asked for "
                    f"{self.group_size}"
                )
            group.parts = completions

    def _go_on(self, groups: Sequence[Group], generator: Generator, seed: int) -> None:
        """One more stretch of every unfinished response; those of one length are asked for together."""
        places: dict[int, list[tuple[Group, int]]] = {}
        for group in groups:
            for k, part in enumerate(group.parts):
                if self._is_unfinished(part):
                    places.setdefault(self._budget(len(part.token_ids)), []).append((group, k))
        for budget in together(places):
            members = places.get(budget, [])
            prompts = [replace(prompt_of(g.sample), begun_ids=g.parts[k].token_ids) for g, k in members]
            sampling = replace(self.sampling, seed=mix(seed, budget) & MOST_SEED, max_new_tokens=budget)
            for (group, k), (more,) in zip(members, generator.generate(prompts, sampling), strict=True):
                part = group.parts[k]
                if more.error is not None:
                    group.parts[k] = more
                    continue
                ids, logprobs = part.token_ids + more.token_ids, part.logprobs + more.logprobs
                group.parts[k] = self._whole(ids, logprobs, more.truncated)

    def _whole(self, ids: list[int], logprobs: list[float], truncated: bool) -> Completion:
        return Completion(
            text=self.processor.decode(ids),
            token_ids=list(ids),
            truncated=truncated,
            num_tokens=len(ids),
            logprobs=list(logprobs),
        )

    def _budget(self, num_tokens: int) -> int:
        """Tokens that a response of `num_tokens` may get in one iteration."""
        left = self.sampling.max_new_tokens - num_tokens
        return left if self.partial_tokens is None else min(left, self.partial_tokens)

    def _is_unfinished(self, part: Completion) -> bool:
        if self.partial_tokens is None or not part.truncated or part.error is not None:
            return False
        if not part.token_ids:
            raise ValueError("model.partial_tokens needs a generator that tells token ids; this one told none")
        return len(part.token_ids) < self.sampling.max_new_tokens

    def _score(self, groups: Sequence[Group]) -> list[list[Rollout]]:
        cases = [Case.from_sample(group.sample) for group in groups]
        answered = [
            Answered(prompt=case.prompt, completion=part, case=case)
            for case, group in zip(cases, groups)
            for part in group.parts
        ]
        scores = iter(self.rubric(answered))
        found: list[list[Rollout]] = []
        for number, (case, group) in enumerate(zip(cases, groups)):
            prompt = prompt_of(group.sample)
            example = self.processor.encode_prompt(prompt, case.id)
            members = []
            for part in group.parts:
                ids = response_ids(part, self.processor)
                told = part.logprobs if len(part.logprobs) == len(ids) else [float("nan")] * len(ids)
                members.append(
                    Rollout(
                        prompt=prompt,
                        case=case,
                        sample=group.sample,
                        example=example,
                        source=group.source,
                        group=number,
                        completion=part,
                        score=next(scores),
                        ids=torch.tensor(ids, dtype=torch.long),
                        engine_logp=torch.tensor(told, dtype=torch.float32),
                    )
                )
            found.append(members)
        return found


def together(budgets: Iterable[int]) -> list[int]:
    """All budgets that some rank has, in order: ranks that share a model must generate equally often."""
    everyone = [sorted(budgets)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = everyone * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, sorted(budgets))
    return sorted({budget for own in everyone for budget in own})


def response_ids(completion: Completion, processor: Processor) -> list[int]:
    """Token ids of a response; where the generator tells none, those of its text, and the end token if it ended."""
    if completion.token_ids or completion.error is not None:
        return completion.token_ids
    return processor.tokenizer.text(completion.text) + ([] if completion.truncated else [processor.turn_end_id])
