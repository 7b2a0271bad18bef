"""Parallel coordinated reasoning: many answers, what they conclude, and one answer that has seen all conclusions.

A round asks K times; each answer is cut down to its message, the text after its thoughts; the next round is asked the
same question together with these messages. arXiv 2601.05593, section 3; STEP3-VL uses 16 answers and a context of 128K.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from step3vl.types import Completion, Generator, Prompt, Sampling

from .budget import Counter, estimated, fit
from .messages import SHUFFLE_SEED, compact, passed_on
from .template import SynthesisTemplate
from .trace import Round, Trace, TraceFile, answer_of, begin, turns

Told = Callable[[int, Trace], None]
"""Told after each round of each question: the question's place in the call, and its trace so far."""


class PaCoReGenerator:
    """Asks another generator in coordinated rounds; itself a `step3vl.types.Generator`.

    An answer that fails (`Completion.error`) is left out, and the others go on without it; only when the last one
    fails, the question has no answer.

    Args:
        generator: who answers each round.
        rounds: answers of each round but the last, which is one: [4], [16], or [32, 4]. [] asks once.
        max_context_tokens: most tokens of a prompt and its answer together; the longest messages are dropped until
            both fit. Null: no limit here.
        counter: counts tokens of prompts; null: characters over four.
        template: file of another synthesis template; null: the published one.
        shuffle_seed: of the order of messages.
        trace: file that gets a line of JSON for every question (docs/pacore.md); null: none.
    """

    def __init__(
        self,
        generator: Generator,
        rounds: Sequence[int] = (16,),
        max_context_tokens: int | None = None,
        counter: Counter | None = None,
        template: str | Path | None = None,
        shuffle_seed: int = SHUFFLE_SEED,
        trace: str | Path | None = None,
        told: Told | None = None,
    ):
        self.widths = [*checked_rounds(rounds), 1]
        self.generator, self.max_context_tokens = generator, max_context_tokens
        self.counter = counter or estimated()
        self.template = SynthesisTemplate(template)
        self.shuffle_seed = shuffle_seed
        self.trace_file = TraceFile(trace) if trace is not None else None
        self.told = told or (lambda place, trace: None)

    @property
    def name(self) -> str:
        """All that decides about answers besides the generator and its sampling; part of the key of kept answers."""
        return (
            f"pacore {self.widths[:-1]} template {self.template.hash} context {self.max_context_tokens} "
            f"shuffle {self.shuffle_seed}"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The same, for a result's provenance."""
        return {
            "rounds": self.widths[:-1],
            "max_context_tokens": self.max_context_tokens,
            "template": self.template.hash,
            "shuffle_seed": self.shuffle_seed,
            "prompt_tokens": "counted" if self.counter.is_exact else "estimated",
        }

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """`n` answers of each prompt, each with rounds of its own. `num_tokens` is the final answer's alone."""
        return [[final for final, _ in group] for group in self.run(prompts, sampling, n)]

    def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        first: Sequence[Sequence[Completion]] | None = None,
    ) -> list[list[tuple[Completion, Trace]]]:
        """`n` answers of each prompt, with their traces.

        Each round is one call of the generator for all prompts. The first is asked with the sampling's own seed, so
        that it says what sequential reasoning with as many samples says; no two rounds share random numbers.

        Args:
            prompts, sampling, n: as of a generator.
            first: answers of the first round, by prompt, where they are known already (n must be 1).

        Raises:
            ValueError: n is below 1, `first` does not fit, or the context holds no more than an answer.
        """
        if n < 1:
            raise ValueError(f"n is {n}; accepted is 1 or more")
        if first is not None and (n != 1 or [len(group) for group in first] != [self.widths[0]] * len(prompts)):
            raise ValueError(f"first must hold {self.widths[0]} answers for each of {len(prompts)} prompts, with n = 1")
        self.check(sampling)
        originals = [prompt for prompt in prompts for _ in range(n)]
        traces = [
            begin(
                prompt,
                sampling,
                k % n,
                widths=self.widths,
                shuffle_seed=self.shuffle_seed,
                max_context_tokens=self.max_context_tokens,
                counted_exactly=self.counter.is_exact,
                template=self.template.hash,
            )
            for k, prompt in enumerate(originals)
        ]
        answers: list[list[Completion]] = []
        for number, width in enumerate(self.widths):
            seeded = replace(sampling, seed=round_seed(sampling.seed, number))
            steps = [self._step(original, answers[k] if number else [], seeded) for k, original in enumerate(originals)]
            start_s = time.monotonic()
            if number:
                answers = self.generator.generate([prompt for prompt, _ in steps], seeded, width)
            elif first is not None:
                answers = [list(group) for group in first]
            else:  # the copies of a prompt share it: asked once, n times as often
                asked = self.generator.generate(list(prompts), seeded, width * n)
                answers = [group[k * width : (k + 1) * width] for group in asked for k in range(n)]
            seconds = round(time.monotonic() - start_s, 3)
            for place, (trace, (_, step), group) in enumerate(zip(traces, steps, answers, strict=True)):
                if len(group) != width:
                    raise ValueError(f"the generator gave {len(group)} answers of {width}")
                step.answers, step.seconds = [answer_of(completion) for completion in group], seconds
                trace.rounds.append(step)
                self.told(place, trace)
        if self.trace_file is not None:
            for trace in traces:
                self.trace_file.write(trace)
        finals = [(group[0], trace) for group, trace in zip(answers, traces)]
        return [finals[k : k + n] for k in range(0, len(finals), n)]

    def check(self, sampling: Sampling) -> None:
        """Raises ValueError when the context holds no more than an answer."""
        if self.max_context_tokens is not None and self.max_context_tokens <= sampling.max_new_tokens:
            raise ValueError(
                f"max_context_tokens is {self.max_context_tokens}, which leaves no room for a prompt beside an answer "
                f"of max_new_tokens = {sampling.max_new_tokens}"
            )

    def _step(self, original: Prompt, before: Sequence[Completion], sampling: Sampling) -> tuple[Prompt, Round]:
        """The prompt that follows from the answers of the round before, and its part of the trace."""
        order = passed_on(before, self.shuffle_seed)
        texts = [compact(before[k].text) for k in order]
        kept = list(range(len(texts)))
        if self.max_context_tokens is not None:
            budget = self.max_context_tokens - sampling.max_new_tokens
            kept = fit(texts, lambda some: self.counter.count(self.template.prompt(original, some)), budget)
        messages = [texts[k] for k in kept]
        prompt = self.template.prompt(original, messages)
        return prompt, Round(
            prompt=turns(prompt),
            seed=sampling.seed,
            answers=[],
            order=order,
            dropped=[place for k, place in enumerate(order) if k not in kept],
            messages=messages,
            num_prompt_tokens=self.counter.count(prompt),
        )


def checked_rounds(rounds: Sequence[int]) -> list[int]:
    """Raises ValueError for anything but a list of counts from 1 to 1024."""
    if isinstance(rounds, str) or not all(type(width) is int and 1 <= width <= 1024 for width in rounds):
        raise ValueError(f"rounds is {rounds!r}; accepted is a list of counts from 1 to 1024, such as [16] or [32, 4]")
    return list(rounds)


def parse_rounds(text: str) -> list[int]:
    """'[16]', '[32, 4]' or '32,4' as a list."""
    found = re.fullmatch(r"\[([\d\s,]+)\]|([\d\s,]+)", text.strip())
    words = (found[1] or found[2]).split(",") if found else [""]
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f'--rounds is {text!r}; accepted is a list of counts, such as "[16]" or "[32, 4]"')
    return checked_rounds([int(word) for word in words])


def round_seed(seed: int | None, number: int) -> int | None:
    """Where a round's random numbers begin: the first round's at `seed`, a later one's far away from it."""
    if seed is None or number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} round {number}".encode()).digest()[:4], "big") >> 1
