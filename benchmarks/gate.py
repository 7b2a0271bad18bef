"""How a benchmark compares variants: interleaved rounds of CPU time, and no verdict from a busy or unsteady machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from statistics import median

import pytest

BUSIEST, WIDEST = 1.5, 0.2
"""Load average, and spread of the rounds as a share of their median, above which there is no verdict."""
LOAD = os.getloadavg()[0]
"""Load average when the benchmarks began; later on it holds their own work and that of their workers."""


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int = 5, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each round of each variant, by turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for k in range(rounds + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if k:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str, title: str = "") -> float:
    """Median of `slow` over median of `fast`; both are printed."""
    middle = {name: median(seconds[name]) for name in (slow, fast)}
    shown = "; ".join(f"{name} {middle[name] * 1e3:,.2f} ms" for name in middle)
    print(f"\n{title or f'{slow} / {fast}'}: {middle[slow] / middle[fast]:.2f}x ({shown})")
    return middle[slow] / middle[fast]


def abstain(seconds: Mapping[str, list[float]]) -> None:
    """Skip the test, with the reason, where its rounds prove nothing; call it after the ratios were printed."""
    if LOAD > BUSIEST:
        pytest.skip(f"no verdict: the load average was {LOAD:.1f}, above {BUSIEST}")
    for name, values in seconds.items():
        if len(values) < 3:
            raise ValueError(f"{name!r} has {len(values)} rounds; a spread needs at least 3")
        low, high = sorted(values)[len(values) // 4], sorted(values)[-1 - len(values) // 4]  # the middle half
        if high - low > WIDEST * median(values):
            pytest.skip(f"no verdict: the rounds of {name!r} spread from {low:.4f} to {high:.4f} s")
