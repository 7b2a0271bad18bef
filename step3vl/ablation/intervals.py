"""How sure a table's numbers are: intervals over seeds and cases together, and rows compared case by case.

Rows of a table answer the same cases, and runs of one seed see the same data in the same order; so two rows are
compared by their differences, seed by seed and case by case. Intervals are 95 % percentile bootstraps in which seeds
and cases are drawn anew, both with replacement (Efron and Tibshirani; crossed resampling as Owen's pigeonhole
bootstrap). With three seeds the spread over seeds is known coarsely: an interval is rather too narrow than too wide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np

NUM_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    num_seeds: int
    num_cases: int

    @property
    def text(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def read_scores(folder: Path) -> dict[str, dict[str, tuple[float, float | None]]]:
    """{benchmark: {case: (score, blind score)}} of a finished run's cases.jsonl; several answers to a case: their mean.

    Raises ValueError when the file is missing.
    """
    path = folder / "cases.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing; run the row again: its metrics.json has no cases beside it")
    found: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        pair = (float(record["score"]), record["blind_score"])
        found.setdefault(record["benchmark"], {}).setdefault(record["id"], []).append(pair)
    return {name: {case: _mean(pairs) for case, pairs in cases.items()} for name, cases in found.items()}


def _mean(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    blind = [b for _, b in pairs if b is not None]
    return float(np.mean([s for s, _ in pairs])), float(np.mean(blind)) if blind else None


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean of [S,N], scores or differences of S seeds and N cases; N may be 1 (a number a run)."""
    return mean_interval([values], seed)


def mean_interval(blocks: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """The mean over capabilities of their means: blocks [S,N_k] of the same seeds; cases are drawn within each.

    Raises ValueError when there is no value, or the numbers of seeds differ.
    """
    sizes = [block.shape for block in blocks]
    if not sizes or any(len(size) != 2 or not all(size) for size in sizes) or len({size[0] for size in sizes}) != 1:
        raise ValueError(f"an interval needs [seeds, cases] of the same seeds, got {sizes}")
    num_seeds = sizes[0][0]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, NUM_RESAMPLES) / num_seeds  # [R,S]
    means = np.zeros(NUM_RESAMPLES)
    for block in blocks:
        num_cases = block.shape[1]
        weights = rng.multinomial(num_cases, [1 / num_cases] * num_cases, NUM_RESAMPLES) / num_cases  # [R,N]
        means += np.einsum("rs,sn,rn->r", draws, block, weights, optimize=True) / len(blocks)
    low, high = np.percentile(means, [2.5, 97.5])
    mean = float(np.mean([block.mean() for block in blocks]))
    return Interval(mean, float(low), float(high), num_seeds, sum(size[1] for size in sizes))


def sign_test(differences: Sequence[float], direction: int) -> tuple[int, float]:
    """(how many of the runs' differences point in `direction`, how probable as many are by chance; ties count half).

    Three seeds that all agree have p = 0.125: no number of agreeing seeds below five reaches 0.05.
    """
    agreeing = sum(1.0 if d * direction > 0 else 0.5 if d == 0 else 0.0 for d in differences)
    n, k = len(differences), int(np.floor(agreeing))
    return k, sum(comb(n, i) for i in range(k, n + 1)) / 2**n


def steps_to(curve: tuple[np.ndarray, np.ndarray], level: float, width: int = 7) -> float:
    """Optimizer steps until the running mean of `width` logged losses is at or below `level`; NaN when it never is."""
    steps, losses = curve
    if len(losses) < width:
        return float("nan")
    means = np.convolve(losses, np.ones(width) / width, mode="valid")  # [L-width+1], ends at steps[width-1:]
    reached = np.flatnonzero(means <= level)
    return float(steps[width - 1 + reached[0]] + 1) if len(reached) else float("nan")


def final_loss(curve: tuple[np.ndarray, np.ndarray], share: float = 0.1) -> float:
    """Mean of the last `share` of the logged losses."""
    losses = curve[1]
    return float(np.mean(losses[-max(1, round(share * len(losses))) :]))


def overlap(seeds: Sequence[Sequence[str]]) -> list[str]:
    """Cases that every run answered, in the order of the first."""
    common = set(seeds[0]).intersection(*seeds[1:]) if seeds else set()
    return [case for case in (seeds[0] if seeds else ()) if case in common]
