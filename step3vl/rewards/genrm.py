"""GenRM: a language model compares two answers, and judges the reasoning behind them (report: RLHF's reward).

The reward is the estimated probability of being the better answer. Every pair is judged in both orders, because judges
prefer a place. A judge that fails fails the whole group: a reward made of what happened to arrive would be a bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from step3vl.evaluation.extract import final_text
from step3vl.types import Generator, Prompt, Sampling

from .base import Answered, Reward
from .verdict import comparison, probability

Pair = tuple[int, int]
REFERENCE = -1
"""Stands in a pair for the reference answer."""


class GenRM:
    """Probability, 0 to 1, of being better than the group's other answers, or than the reference.

    A group is the answers to one prompt of one case. Truncated and malformed answers get 0 and are compared with none;
    a sound answer that is left without a rival gets 0.5. Where a verdict is missing after all retries, the whole group
    is None, and so is a group of a single answer, which has nothing to be compared with.

    Args:
        generator: who judges.
        max_new_tokens: of a verdict with its thoughts.
        pairs: circular: each answer with the next one, as many comparisons as answers. all: every two answers.
            reference: each answer with gold["reference"], else with the case's answer.
        reasoning_share: share of the verdict that is about the reasoning.
        num_retries: further tries for a pair without a readable verdict; these are drawn at temperature 1.
        well_formed: a reward; an answer that it gives 0 is malformed. None: only an empty answer is.
        longest: characters of an answer that the judge is shown, thoughts included: its end.
        show_images: the judge sees the prompt's images.
    """

    name = "genrm"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __init__(
        self,
        generator: Generator,
        max_new_tokens: int,
        pairs: Literal["circular", "all", "reference"] = "circular",
        reasoning_share: float = 0.25,
        num_retries: int = 3,
        well_formed: Reward | None = None,
        longest: int = 20_000,
        show_images: bool = False,
    ):
        if pairs not in ("circular", "all", "reference"):
            raise ValueError(f"pairs is {pairs!r}; accepted are circular, all and reference")
        if not 0.0 <= reasoning_share <= 1.0 or num_retries < 0 or longest < 1:
            raise ValueError(
                "GenRM needs reasoning_share in 0 to 1, num_retries >= 0 and longest >= 1, got "
                f"{reasoning_share}, {num_retries} and {longest}"
            )
        self.generator, self.max_new_tokens, self.pairs = generator, max_new_tokens, pairs
        self.reasoning_share, self.num_retries, self.well_formed = reasoning_share, num_retries, well_formed
        self.longest, self.show_images = longest, show_images
        self.counts: Counter[str] = Counter()

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        groups: dict[tuple, list[int]] = {}
        for k, rollout in enumerate(rollouts):
            if rollout.completion.error is None:
                turns = tuple((message.role, message.content) for message in rollout.prompt.messages)
                groups.setdefault((rollout.case.id, turns), []).append(k)
        sound = self._sound(rollouts)
        jobs = {key: self._compared([k for k in members if sound[k]]) for key, members in groups.items()}
        better = self._judge(rollouts, [pair for pairs in jobs.values() for pair in pairs])
        values: list[float | None] = [None] * len(rollouts)
        for key, members in groups.items():
            if any(better[pair] is None for pair in jobs[key]):
                self.counts["failed_groups"] += 1
            elif len(members) > 1 or self.pairs == "reference":
                for k in members:
                    values[k] = _mean(k, jobs[key], better) if sound[k] else 0.0
        return values

    def _sound(self, rollouts: Sequence[Answered]) -> list[bool]:
        formed = [None] * len(rollouts) if self.well_formed is None else self.well_formed(rollouts)
        return [
            not rollout.completion.truncated and bool(final_text(rollout.text)) and value != 0.0
            for rollout, value in zip(rollouts, formed, strict=True)
        ]

    def _compared(self, members: list[int]) -> list[Pair]:
        if self.pairs == "reference":
            return [(k, REFERENCE) for k in members]
        if self.pairs == "all" or len(members) < 3:
            return list(combinations(members, 2))
        return list(zip(members, [*members[1:], members[0]]))

    def _judge(self, rollouts: Sequence[Answered], pairs: list[Pair]) -> dict[Pair, float | None]:
        """Probability that the first of each pair is better; None: no verdict in one of the two orders."""
        orders = [order for pair in pairs for order in (pair, pair[::-1]) if not self._is_same(rollouts, *pair)]
        waiting = {order: self._prompt(rollouts, *order) for order in orders}
        found: dict[Pair, float] = {}
        for attempt in range(self.num_retries + 1):
            if not waiting:
                break
            sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=1.0 if attempt else 0.0)
            replies = self.generator.generate(list(waiting.values()), sampling)
            for order, (reply,) in zip(list(waiting), replies, strict=True):
                self.counts["asked"] += 1
                self.counts["outages"] += reply.error is not None
                value = None if reply.error is not None else probability(reply.text, self.reasoning_share)
                self.counts["unreadable_verdicts"] += reply.error is None and value is None
                if value is not None:
                    found[order] = value
                    del waiting[order]
        better: dict[Pair, float | None] = {}
        for pair in pairs:
            one, other = found.get(pair), found.get(pair[::-1])
            if self._is_same(rollouts, *pair):
                better[pair] = 0.5
            elif one is None or other is None:
                better[pair] = None
            else:
                better[pair] = (one + 1.0 - other) / 2.0
                self.counts["pairs"] += 1
                self.counts["pairs_decided_by_place"] += (one > 0.5 and other > 0.5) or (one < 0.5 and other < 0.5)
        return better

    def _prompt(self, rollouts: Sequence[Answered], first: int, second: int) -> Prompt:
        rollout = rollouts[first if first != REFERENCE else second]
        texts = [self._text(rollouts, first, second), self._text(rollouts, second, first)]
        return comparison(rollout.prompt, texts[0], texts[1], self.longest, self.show_images)

    def _text(self, rollouts: Sequence[Answered], k: int, other: int) -> str:
        if k != REFERENCE:
            return rollouts[k].text
        case = rollouts[other].case
        return str(case.gold.get("reference", case.answer))

    def _is_same(self, rollouts: Sequence[Answered], first: int, second: int) -> bool:
        return self._text(rollouts, first, second).strip() == self._text(rollouts, second, first).strip()


def _mean(member: int, pairs: list[Pair], better: dict[Pair, float | None]) -> float:
    own = [
        value if pair[0] == member else 1.0 - value
        for pair in pairs
        if member in pair and (value := better[pair]) is not None
    ]
    return sum(own) / len(own) if own else 0.5
