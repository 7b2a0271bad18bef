"""What a score is worth: mean, bootstrap interval, the blind score, the majority baseline, the number of cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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


def bootstrap(values: Sequence[float], num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of cases."""
    array = np.asarray(values, dtype=np.float64)  # [n]
    if array.size == 0:
        raise ValueError("bootstrap needs at least one value, got none")
    draws = np.random.default_rng(seed).integers(0, array.size, (num_resamples, array.size))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarise(records: Sequence[Record], majority: float) -> Score:
    """Records of one capability -> its Score."""
    values = [r.score for r in records]
    low, high = bootstrap(values)
    blind = [r.blind_score for r in records if r.blind_score is not None]
    return Score(
        score=float(np.mean(values)),
        low=low,
        high=high,
        blind=float(np.mean(blind)) if blind else majority,
        majority=majority,
        num_cases=len(records),
        truncated_rate=float(np.mean([r.truncated for r in records])),
        unreadable_rate=float(np.mean([r.unreadable for r in records])),
    )


def majority_score(benchmark: Benchmark, cases: Sequence[Case]) -> float:
    """Score of always giving the commonest gold answer of these very cases: what knowing the answer prior is worth."""
    counts = Counter(case.answer for case in cases)
    guess = min(counts, key=lambda answer: (-counts[answer], answer))
    return float(np.mean([benchmark.score(case, guess) for case in cases]))
