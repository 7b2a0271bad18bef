"""What a score is worth: mean, bootstrap interval, the blind score, the majority baseline, the number of cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .benchmark import Benchmark, Case
from .runner import Record


@dataclass(slots=True, kw_only=True)
class Score:
    """One capability of one model.

    Read `score` against `blind` (the same model, image masked) and `majority` (always the commonest answer): what is
    above both was seen. `low`..`high` is a bootstrap 95 % interval over cases; it says nothing about seeds.
    """

    score: float
    """Mean over cases; of several answers to a case, their mean (pass@1)."""
    low: float
    high: float
    blind: float
    """Of cases without an image: the majority score, as nothing can be masked."""
    majority: float
    num_cases: int
    truncated_rate: float
    """Share of answers cut by max_new_tokens; above a few per cent the score measures the limit, not the model."""
    unreadable_rate: float
    """Share of answers in which the scorer found nothing of the expected form."""
    failed_rate: float = 0.0
    """Share of questions that got no answer at all, because the generator failed; the score is not to be used."""
    headline: float = 0.0
    """The benchmark's own number, where it is not the mean over cases (MMStar, MMVP)."""
    num_samples: int = 1
    """Answers a case."""
    voted: float | None = None
    """maj@k: the commonest of a case's answers is right. None: one answer a case."""
    covered: float | None = None
    """cov@k: some answer of a case is right; what choosing perfectly among them would give."""
    num_tokens: float = 0.0
    """Mean length of an answer."""
    groups: dict[str, float] = field(default_factory=dict)
    """Mean score by category."""


def bootstrap(values: Sequence[float], num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of cases."""
    array = np.asarray(values, dtype=np.float64)  # [n]
    if array.size == 0:
        raise ValueError("bootstrap needs at least one value, got none")
    means = resampled_means(array, num_resamples, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def resampled_means(array: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Means [num_resamples] of as many values drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, 10**7 // max(1, array.size))  # of a block, so that large benchmarks stay small in memory
    blocks = [min(rows, num_resamples - start) for start in range(0, num_resamples, rows)]
    return np.concatenate([array[rng.integers(0, array.size, (num, array.size))].mean(axis=1) for num in blocks])


def summarise(records: Sequence[Record], majority: float, benchmark: Benchmark | None = None) -> Score:
    """Records of one capability -> its Score; `benchmark` adds its own headline and groups."""
    by_case = of_cases(records)
    values = [float(np.mean([r.score for r in group])) for group in by_case.values()]
    low, high = bootstrap(values)
    blind = [r.blind_score for r in records if r.blind_score is not None]
    num_samples = max(len(group) for group in by_case.values())
    return Score(
        score=float(np.mean(values)),
        low=low,
        high=high,
        blind=float(np.mean(blind)) if blind else majority,
        majority=majority,
        num_cases=len(by_case),
        truncated_rate=float(np.mean([r.truncated for r in records])),
        unreadable_rate=float(np.mean([r.unreadable for r in records])),
        failed_rate=float(np.mean([r.error is not None for r in records])),
        headline=benchmark.headline(records) if benchmark is not None else float(np.mean(values)),
        num_samples=num_samples,
        voted=float(np.mean([voted(group) for group in by_case.values()])) if num_samples > 1 else None,
        covered=float(np.mean([max(r.score for r in g) for g in by_case.values()])) if num_samples > 1 else None,
        num_tokens=float(np.mean([r.num_tokens for r in records])),
        groups=benchmark.breakdown(records) if benchmark is not None else {},
    )


def of_cases(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Answers by case, in order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.id, []).append(record)
    return groups


def voted(group: Sequence[Record]) -> float:
    """Score of the answer that most samples of a case agree in; of equally many, the one given first."""
    counts = Counter(record.vote for record in group)
    best = max(counts, key=lambda vote: (counts[vote], -[r.vote for r in group].index(vote)))
    return next(record.score for record in group if record.vote == best)


def majority_score(benchmark: Benchmark, cases: Sequence[Case]) -> float:
    """Score of always giving the commonest gold answer of these very cases: what knowing the answer prior is worth."""
    counts = Counter(case.answer for case in cases)
    guess = min(counts, key=lambda answer: (-counts[answer], answer))
    return float(np.mean(benchmark.scores([(case, guess) for case in cases])))


@dataclass(slots=True, kw_only=True)
class Difference:
    """B's score less A's on the same cases."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    """95 % interval of the difference, by bootstrap over cases."""
    p_value: float
    """Two-sided: how often a difference this large arises when A and B swap places at random, case by case."""
    num_cases: int
    num_better: int
    """Cases where B scored higher."""
    num_worse: int


def difference(
    a: Mapping[str, float], b: Mapping[str, float], num_resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare two models by the scores of the cases that both were asked, paired.

    Args:
        a, b: score by case.

    Raises:
        ValueError: they have no case in common.
    """
    common = [id for id in a if id in b]
    if not common:
        raise ValueError("the two have no case in common")
    x, y = (np.array([scores[id] for id in common]) for scores in (a, b))
    gaps = y - x
    low, high = np.percentile(resampled_means(gaps, num_resamples, seed), [2.5, 97.5])
    rng = np.random.default_rng(seed + 1)
    told = gaps[gaps != 0]
    rows = max(1, 10**7 // max(1, told.size))
    num_extreme = 0
    for start in range(0, num_resamples, rows):
        signs = rng.integers(0, 2, (min(rows, num_resamples - start), told.size)) * 2 - 1
        num_extreme += int((np.abs((signs * told).sum(axis=1)) >= abs(told.sum()) - 1e-12).sum())
    return Difference(
        a=float(x.mean()),
        b=float(y.mean()),
        difference=float(gaps.mean()),
        low=float(low),
        high=float(high),
        p_value=(num_extreme + 1) / (num_resamples + 1),
        num_cases=len(common),
        num_better=int((gaps > 0).sum()),
        num_worse=int((gaps < 0).sum()),
    )
