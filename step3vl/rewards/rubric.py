"""A rubric says which rewards an answer gets, by the type of its question, and adds them up with their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .base import Answered, Reward, checked


@dataclass(slots=True, kw_only=True)
class Weighted:
    """One line of a rubric."""

    reward: Reward
    weight: float = 1.0
    """Factor of the reward's value in the total."""
    required: bool = True
    """An answer that this reward cannot judge has no total. False: it is left out of the total, and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one answer earned."""

    total: float | None
    """None: it could not be judged, and is no training material."""
    parts: dict[str, float | None] = field(default_factory=dict)
    """Value of each reward by name, before its weight; None: not judged."""
    outcome: Literal["scored", "unjudged", "truncated", "error"]
    """unjudged: a required reward was None. error: the generator failed, there is no answer."""


class Rubric:
    """Rewards by answer type, and penalties for all.

    Args:
        answers: answer type (exact, letter, number, ...) to name to weighted reward; the names are those of the log.
            The type "otherwise" stands for all that are not listed.
        penalties: name to weighted reward, for every answer.
        truncated: of an answer that ran into the length limit. zero: its total is 0, unread. drop: it has none.
            score: it is scored like any other. With penalties, 0 may be more than a bad whole answer earns.
    """

    def __init__(
        self,
        answers: dict[str, dict[str, Weighted]],
        penalties: dict[str, Weighted] | None = None,
        truncated: Literal["zero", "drop", "score"] = "zero",
    ):
        if truncated not in ("zero", "drop", "score"):
            raise ValueError(f"truncated is {truncated!r}; accepted are zero, drop and score")
        self.answers, self.penalties, self.truncated = answers, penalties or {}, truncated
        for kind, lines in answers.items():
            if not lines:
                raise ValueError(f"answers.{kind} lists no reward")
            if double := lines.keys() & self.penalties.keys():
                raise ValueError(f"answers.{kind} and penalties share the name {sorted(double)[0]!r}")
        if not answers:
            raise ValueError("a rubric needs rewards for at least one answer type; answers is empty")

    def __call__(self, rollouts: Sequence[Answered]) -> list[Score]:
        """Scores in the order of the answers. Each reward is asked once, for all answers that it concerns.

        Raises ValueError for an answer type that the rubric does not know, and for a reward that breaks its word.
        """
        lines = [self.lines(rollout) for rollout in rollouts]
        scores: dict[int, Score] = {}
        for k, rollout in enumerate(rollouts):
            if rollout.completion.error is not None:
                scores[k] = Score(total=None, outcome="error")
            elif rollout.completion.truncated and self.truncated != "score":
                scores[k] = Score(total=0.0 if self.truncated == "zero" else None, outcome="truncated")
        parts: dict[int, dict[str, float | None]] = {k: {} for k in range(len(rollouts)) if k not in scores}
        asked: dict[int, tuple[Reward, list[tuple[int, str]]]] = {}
        for k in parts:
            for name, line in lines[k].items():
                asked.setdefault(id(line), (line.reward, []))[1].append((k, name))
        for reward, members in asked.values():
            for (k, name), value in zip(members, checked(reward, [rollouts[k] for k, _ in members])):
                parts[k][name] = value
        for k, found in parts.items():
            scores[k] = _added(found, lines[k])
        return [scores[k] for k in range(len(rollouts))]

    def lines(self, rollout: Answered) -> dict[str, Weighted]:
        """The weighted rewards that concern an answer."""
        kind = rollout.case.answer_type
        if kind not in self.answers and "otherwise" not in self.answers:
            raise ValueError(
                f"{rollout.case.id}: answer_type {kind!r} is not in the rubric; accepted: {', '.join(self.answers)}"
            )
        return self.answers.get(kind, self.answers.get("otherwise", {})) | self.penalties

    def counts(self) -> dict[str, int]:
        """What the rewards counted since the start (time-outs, outages), by "answer type/name/count"."""
        groups: Mapping[str, Mapping[str, Weighted]] = self.answers | {"penalties": self.penalties}
        return {
            f"{kind}/{name}/{key}": count
            for kind, lines in groups.items()
            for name, line in lines.items()
            for key, count in getattr(line.reward, "counts", {}).items()
        }


def _added(parts: dict[str, float | None], lines: Mapping[str, Weighted]) -> Score:
    if any(parts[name] is None and line.required for name, line in lines.items()):
        return Score(total=None, parts=parts, outcome="unjudged")
    total = sum(line.weight * value for name, line in lines.items() if (value := parts[name]) is not None)
    return Score(total=total, parts=parts, outcome="scored")


def summarise(scores: Sequence[Score]) -> dict[str, float]:
    """For the log: mean total and means by name over what was judged, how often a name was not, and shares of outcomes.

    Keys: "total"; "mean/NAME"; "unjudged/NAME", a number of answers; "share/OUTCOME".
    """
    found: dict[str, list[float]] = {}
    missing: Counter[str] = Counter()
    for score in scores:
        for name, value in score.parts.items():
            missing[name] += value is None
            if value is not None:
                found.setdefault(name, []).append(value)
    totals = [score.total for score in scores if score.total is not None]
    outcomes = Counter(score.outcome for score in scores)
    log = {"total": sum(totals) / len(totals)} if totals else {}
    log |= {f"mean/{name}": sum(values) / len(values) for name, values in sorted(found.items())}
    log |= {f"unjudged/{name}": float(count) for name, count in sorted(missing.items())}
    return log | {f"share/{name}": count / len(scores) for name, count in sorted(outcomes.items())}
