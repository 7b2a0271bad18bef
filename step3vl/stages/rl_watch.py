"""What an iteration of reinforcement learning says about itself; how to read each name is in `RLStage`'s docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from step3vl.rewards import summarise
from step3vl.rl.collect import Collector
from step3vl.rl.filters import Filter
from step3vl.rl.rollout import Rollout

from .tally import Tally, gather

EMPTY_ITERATIONS = 20
"""Iterations in a row without a rollout to learn from, after which a run ends."""


def count_rollouts(
    tally: Tally,
    groups: Sequence[Sequence[Rollout]],
    filters: Sequence[Filter],
    dropped: Mapping[str, int],
    collector: Collector,
) -> None:
    """Count what was generated, scored and left out. `dropped`: groups left out, by the name of the filter."""
    everyone = [rollout for group in groups for rollout in group]
    scores = [rollout.score for rollout in everyone]
    for name, value in summarise(scores).items() if scores else ():
        kind, _, rest = name.partition("/")
        if kind == "mean":
            judged = sum(score.parts.get(rest) is not None for score in scores)
            tally.mean(f"reward/{rest}", value * judged, judged)
    totals = [score.total for score in scores if score.total is not None]
    tally.mean("reward", sum(totals), len(totals))
    lengths = [len(rollout.ids) for rollout in everyone]
    tally.mean("length", float(sum(lengths)), len(lengths))
    tally.maximum("length_max", float(max(lengths, default=0)))
    shares = {
        "truncated": sum(rollout.completion.truncated for rollout in everyone),
        "unjudged": sum(score.outcome == "unjudged" for score in scores),
        "failed": sum(score.outcome == "error" for score in scores),
    }
    for name, number in shares.items():
        tally.mean(name, float(number), len(everyone))
    for name in [*(rule.name for rule in filters), "unjudged"]:
        tally.mean(f"dropped/{name}", float(dropped.get(name, 0)), len(groups))
    tally.count("waiting", len(collector.waiting))
    for phase, seconds in collector.seconds.items():
        tally.mean(f"seconds/{phase}", seconds)


def check_answers(groups: Sequence[Sequence[Rollout]], iteration: int) -> None:
    """Raises ValueError, on all ranks, when no response of an iteration came: the generator is gone."""
    everyone = [rollout.completion for group in groups for rollout in group]
    errors = [completion.error for completion in everyone if completion.error is not None]
    found = gather((len(everyone), len(errors), errors[:1]))
    num, num_failed = sum(n for n, _, _ in found), sum(n for _, n, _ in found)
    if num and num == num_failed:
        first = next(error for _, _, some in found for error in some)
        raise ValueError(
            f"iteration {iteration}: all {num} responses failed, the first with: {first}; nothing was learnt "
            "from them, and the newest checkpoint is from before (--ckpt_path=last goes on)"
        )


def check_empty(num_empty: int) -> None:
    """Raises ValueError when `num_empty` iterations in a row gave nothing to learn from, and that is too many."""
    if num_empty >= EMPTY_ITERATIONS:
        raise ValueError(
            f"{num_empty} iterations in a row gave nothing to learn from: every group was dropped; look at "
            "dropped/*, unjudged and failed in the log"
        )
