"""Work of the ranks in a step, largest over mean, on a mixture of text and images: as drawn, and balanced by FLOPs.

FLOPs are those of the full-size model (`step3vl.models.flops`); no model is built. A balanced plan counts only if it
takes exactly the samples that the plain one takes. Run: make bench
"""

from collections import Counter

import numpy as np
import pytest

from step3vl.data.plan import RowPlan, SamplePlan
from step3vl.types import Size

NUM_RANKS, NUM_STEPS, ROW = 8, 64, 32_768
VIEW_TFLOP = {"crop": 15.1, "global": 34.9}  # training, tower and projector


def cost(size):
    """Training FLOPs of STEP3-VL-10B, in TFLOP, by the formula of docs/performance.md."""
    text = 3 * (2 * 6.946e9 * size.num_tokens + 36 * 4 * 4096 * size.num_tokens**2 / 2 + 2 * 0.622e9 * size.num_labels)
    return text / 1e12 + size.num_crops * VIEW_TFLOP["crop"] + size.num_global_views * VIEW_TFLOP["global"]


class Mixed:
    """A measured mixture of text (median 1,000 tokens) and images (0 to 36 crops), without files behind it."""

    unit, seed, is_measured, seq_len = "tokens", 0, True, ROW
    sources = {"text": None, "images": None}

    def __init__(self):
        rng = np.random.default_rng(0)
        text = rng.lognormal(np.log(1000), 1.0, 20_000).clip(16, ROW).astype(int)
        crops = rng.choice([0, 1, 2, 4, 6, 9, 12, 20, 36], 20_000, p=[0.3, 0.1, 0.15, 0.15, 0.1, 0.1, 0.05, 0.03, 0.02])
        words = rng.lognormal(np.log(300), 0.7, 20_000).clip(16, 4096).astype(int)
        self.sizes = {
            "text": [Size(int(n), int(n) // 2, 0, 0) for n in text],
            "images": [Size(int(n + 83 * c + 171), int(n) // 2, int(c), 1) for n, c in zip(words, crops)],
        }

    def shares(self):
        return {"text": 0.5, "images": 0.5}

    def size(self, draw):
        return self.sizes[draw[0]][draw[1] % 20_000]


def steps_of(plan_of):
    plans = [plan_of(rank) for rank in range(NUM_RANKS)]
    return [[[d for row in next(plan).rows for d in row] for plan in plans] for _ in range(NUM_STEPS)]


def worst(steps, mixture):
    work = np.array([[sum(cost(mixture.size(d)) for d in rank) for rank in ranks] for ranks in steps])
    ratios = work.max(1) / work.mean(1)
    return float(ratios.mean()), float(ratios.max())


CASES = {
    "32 samples a rank": lambda m, r, c: SamplePlan(m, 32, r, NUM_RANKS, c),
    "4 rows a rank": lambda m, r, c: RowPlan(m, 4, ROW, r, NUM_RANKS, cost=c),
    "1 row a rank": lambda m, r, c: RowPlan(m, 1, ROW, r, NUM_RANKS, cost=c),
}


@pytest.mark.parametrize("case", CASES)
def test_balance(benchmark, case):
    mixture, make = Mixed(), CASES[case]
    plain = steps_of(lambda rank: make(mixture, rank, None))
    even = steps_of(lambda rank: make(mixture, rank, cost))
    assert Counter(d for s in plain for r in s for d in r) == Counter(d for s in even for r in s for d in r)
    benchmark.group = f"planning {NUM_STEPS} steps of {NUM_RANKS} ranks, {case}"
    benchmark.pedantic(steps_of, args=(lambda rank: make(mixture, rank, cost),), rounds=3)
    (mean, most), (even_mean, even_most) = worst(plain, mixture), worst(even, mixture)
    print(
        f"\n{case}: largest over mean work of {NUM_RANKS} ranks, mean of {NUM_STEPS} steps (worst step): "
        f"as drawn {mean:.2f} ({most:.2f}), balanced {even_mean:.3f} ({even_most:.3f})"
    )
    assert even_mean <= 1.10
