"""Accuracy against the number of rollouts: one of them, their vote, the best of them, and one answer that has seen all.

Rollouts are asked once, as many as the largest number needs; the paper's evaluation draws from such a pool too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from step3vl.evaluation import Benchmark, Case, Record, bootstrap, difference
from step3vl.evaluation.runner import chunks
from step3vl.evaluation.statistics import voted
from step3vl.types import Completion, Generator, Sampling

from .generator import PaCoReGenerator
from .measures import Coordination, Tally


@dataclass(slots=True, kw_only=True)
class Point:
    """One number of rollouts: four ways to make one answer of them."""

    num_rollouts: int
    mean: float
    """One rollout alone, on average: sequential reasoning."""
    voted: float
    """maj@k: the commonest answer."""
    covered: float
    """cov@k: the best one, by an oracle."""
    pacore: float
    """One more answer that has seen all messages."""
    pacore_low: float
    pacore_high: float
    """Bootstrap 95 % interval over cases."""
    pacore_less_voted: float
    p_value: float
    """Of that difference, paired case by case."""
    gain: float
    """Of PaCoRe over one rollout alone, `mean`."""
    gain_low: float
    gain_high: float
    """95 % interval of the gain, by bootstrap over cases, paired."""
    emergent: float | None
    cross_checks: float
    num_rollout_tokens: float
    """Generated for a question by the rollouts: what voting costs."""
    num_tokens: float
    """The same with the synthesis."""
    seconds: float
    """Of the rollouts' call and the synthesis's; the rollouts' is that of the largest k, which all others share."""
    num_failed: int
    num_dropped: int


@dataclass(slots=True, kw_only=True)
class Scaling:
    """The curve of one benchmark."""

    benchmark: str
    num_cases: int
    points: list[Point] = field(default_factory=list)


def scaling(
    name: str,
    benchmark: Benchmark,
    generator: Generator,
    sampling: Sampling,
    widths: Sequence[int] = (1, 2, 4, 8, 16),
    limit: int | None = None,
    cases_per_call: int = 16,
    done: Callable[[int], None] = lambda num: None,
    synthesiser: Generator | None = None,
    foreign: bool = False,
    **settings: Any,
) -> Scaling:
    """Accuracy against rollouts. Every case is asked max(widths) times once; k rollouts are the first k of these.

    Args:
        name, benchmark, generator, sampling: as in `step3vl.evaluation.evaluate`.
        widths: numbers of rollouts.
        limit: only the first so many cases.
        cases_per_call: cases that are in memory at a time.
        done: told after each call how many cases are done.
        synthesiser: who coordinates the rollouts; None: the generator itself.
        foreign: a control: each case is shown the messages of the case before it (the first one: of the last in its
            call), and judged by its own answer. What is left of the gain does not come from messages.
        settings: further arguments of PaCoReGenerator: max_context_tokens, counter, template, trace.

    Raises:
        ValueError: no widths, or one below 1; the benchmark has no case; foreign messages of a single case.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths is {list(widths)}; accepted are numbers of rollouts from 1")
    widths = sorted(set(widths))
    rollouts: list[list[Record]] = []
    finals: dict[int, list[float]] = {k: [] for k in widths}
    tallies = {k: Tally() for k in widths}
    before: list[Completion] | None = None
    for call, cases in enumerate(chunks(benchmark.stream(limit), cases_per_call)):
        seeded = replace(sampling, seed=None if sampling.seed is None else sampling.seed + call)
        prompts = [case.prompt for case in cases]
        timed = _Timed(generator)
        said = timed.generate(prompts, seeded, widths[-1])
        scores = iter(benchmark.scores([(case, c.text) for case, group in zip(cases, said) for c in group]))
        for case, group in zip(cases, said):
            rollouts.append([_record(name, benchmark, case, c, next(scores), k) for k, c in enumerate(group)])
        if foreign and before is None and len(cases) == 1:
            raise ValueError(f"{name} begins with a call of one case: no other case has messages to show it")
        shown = [before or said[-1], *said[:-1]] if foreign else said
        before = said[-1]
        for k in widths:
            pacore = PaCoReGenerator(synthesiser or generator, [k], **settings)
            runs = pacore.run(prompts, seeded, first=[group[:k] for group in shown])
            own = benchmark.scores([(case, final.text) for case, ((final, _),) in zip(cases, runs)])
            for records, ((_, trace),), score in zip(rollouts[-len(cases) :], runs, own):
                trace.rounds[0].seconds = timed.seconds
                tallies[k].add(trace, [r.score for r in records[:k] if r.error is None], score)
            finals[k] += own
        done(len(rollouts))
    if not rollouts:
        raise ValueError(f"{name} has no case to ask")
    points = [_point(k, rollouts, finals[k], tallies[k].result()) for k in widths]
    return Scaling(benchmark=name, num_cases=len(rollouts), points=points)


class _Timed:
    """A generator with a clock."""

    def __init__(self, generator: Generator):
        self.generator, self.seconds = generator, 0.0

    def generate(self, prompts: Sequence[Any], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        start_s = time.monotonic()
        out = self.generator.generate(prompts, sampling, n)
        self.seconds = round(time.monotonic() - start_s, 3)
        return out


def _record(name: str, benchmark: Benchmark, case: Case, said: Completion, score: float, number: int) -> Record:
    return Record(
        benchmark=name,
        id=case.id,
        question="",
        answer=case.answer,
        said="",
        said_blind="",
        score=score,
        blind_score=None,
        truncated=said.truncated,
        unreadable=False,
        sample=number,
        vote=benchmark.vote(case, said.text),
        num_tokens=said.num_tokens,
        error=said.error,
    )


def _point(
    k: int,
    rollouts: Sequence[Sequence[Record]],
    finals: Sequence[float],
    seen: Coordination,
) -> Point:
    used = [group[:k] for group in rollouts]
    votes = [voted(group) for group in used]
    low, high = bootstrap(finals)
    means = [float(np.mean([r.score for r in group])) for group in used]
    by_vote, by_mean, by_pacore = (
        dict(zip(map(str, range(len(rollouts))), values)) for values in (votes, means, finals)
    )
    gap, gain = difference(by_vote, by_pacore), difference(by_mean, by_pacore)
    return Point(
        num_rollouts=k,
        mean=float(np.mean(means)),
        voted=float(np.mean(votes)),
        covered=float(np.mean([max(r.score for r in group) for group in used])),
        pacore=float(np.mean(finals)),
        pacore_low=low,
        pacore_high=high,
        pacore_less_voted=gap.difference,
        p_value=gap.p_value,
        gain=gain.difference,
        gain_low=gain.low,
        gain_high=gain.high,
        emergent=seen.emergent,
        cross_checks=seen.cross_checks,
        num_rollout_tokens=seen.num_tokens - seen.num_final_tokens,
        num_tokens=seen.num_tokens,
        seconds=seen.seconds,
        num_failed=seen.num_failed,
        num_dropped=seen.num_dropped,
    )
