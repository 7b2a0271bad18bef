"""Ask a model, with and without its eyes, and score what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from PIL import Image

from step3vl.types import Completion, Generator, Prompt, Sampling

from .benchmark import Benchmark, Case

MASK_COLOUR = (128, 128, 128)  # mid grey carries no information about the image


@dataclass(slots=True, kw_only=True)
class Record:
    """One answer to one case.

    Example: Record(benchmark="reading", id="test-000012", answer="471", said="471", said_blind="20", score=1.0, ...)
    """

    benchmark: str
    id: str
    question: str
    answer: str
    said: str
    said_blind: str
    score: float
    blind_score: float | None
    """None: not asked blind, or without an image to mask."""
    truncated: bool
    unreadable: bool
    group: str = ""
    sample: int = 0
    """Number of the answer, where a case is asked several times."""
    vote: str = ""
    """What answers that mean the same have in common."""
    num_tokens: int = 0
    """Tokens of the answer."""
    error: str | None = None
    """Why there is no answer; such a record counts as wrong, and is counted apart."""


def mask_images(prompt: Prompt) -> Prompt:
    """The same prompt with every image replaced by plain grey of the same size: what a model answers blind."""
    blind = [Image.new("RGB", image.size, MASK_COLOUR) for image in prompt.images]
    return Prompt(messages=prompt.messages, images=blind)


def measure(
    name: str,
    benchmark: Benchmark,
    cases: Sequence[Case],
    generator: Generator,
    sampling: Sampling,
    blind: bool = True,
    n: int = 1,
) -> list[Record]:
    """Answer each case `n` times seeing and, unless switched off or without an image, once blind.

    Returns n records a case, in order; the blind answer stands in the first of them.
    """
    seen = generator.generate([case.prompt for case in cases], sampling, n)
    unseen: list[Completion | None] = [None] * len(cases)
    if blind:
        with_images = [k for k, case in enumerate(cases) if case.prompt.images]
        masked = [mask_images(cases[k].prompt) for k in with_images]
        for k, group in zip(with_images, generator.generate(masked, sampling) if masked else []):
            unseen[k] = group[0]
    pairs = [(case, completion.text) for case, group in zip(cases, seen) for completion in group]
    scores = iter(benchmark.scores(pairs))
    asked = [(case, without.text) for case, without in zip(cases, unseen) if without is not None]
    blind_scores = dict(zip((id(case) for case, _ in asked), benchmark.scores(asked)))
    return [
        Record(
            benchmark=name,
            id=case.id,
            question=case.prompt.messages[-1].content,
            answer=case.answer,
            said=completion.text,
            said_blind=without.text if without and not number else "",
            score=next(scores),
            blind_score=blind_scores.get(id(case)) if not number else None,
            truncated=completion.truncated,
            unreadable=not benchmark.is_readable(case, completion.text),
            group=case.group,
            sample=number,
            vote=benchmark.vote(case, completion.text),
            num_tokens=completion.num_tokens,
            error=completion.error,
        )
        for case, group, without in zip(cases, seen, unseen)
        for number, completion in enumerate(group)
    ]


def evaluate(
    name: str,
    benchmark: Benchmark,
    generator: Generator,
    sampling: Sampling,
    n: int = 1,
    limit: int | None = None,
    blind: bool = True,
    cases_per_call: int = 64,
    done: Callable[[int, list[Case]], None] = lambda num, cases: None,
) -> list[Record]:
    """Measure a whole benchmark, some cases a call.

    Which cases share a call is fixed, and so are the random numbers of each call: a run that was interrupted and goes
    on from kept answers (`step3vl.evaluation.answers`) gives the numbers of one that was not.

    Args:
        name, benchmark, generator, sampling, n, blind: as in `measure`; sampling.seed is the seed of the first call.
        limit: only the first so many cases.
        cases_per_call: cases that are in memory at a time.
        done: told after each call how many cases are answered, and which these were.
    """
    records: list[Record] = []
    stream, number = benchmark.stream(limit), 0
    for call, cases in enumerate(chunks(stream, cases_per_call)):
        seed = None if sampling.seed is None else sampling.seed + call
        records += measure(name, benchmark, cases, generator, replace(sampling, seed=seed), blind, n)
        number += len(cases)
        done(number, cases)
    return records


def chunks(stream: Iterator[Case], size: int) -> Iterator[list[Case]]:
    """The stream in lists of `size`; the last may be shorter."""
    while chunk := list(islice(stream, size)):
        yield chunk
