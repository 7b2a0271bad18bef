"""How often a judge prefers a model's answers to those that another run gave to the same questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from step3vl.evaluation import Case, HeldOut
from step3vl.types import Completion

from .base import Answered
from .genrm import GenRM


class WinRate(HeldOut):
    """The mean probability of being better than the rival, each pair judged in both orders; 0.5 is a draw.

    Args:
        shards: pattern of the questions' shards.
        rival: `cases.jsonl` of the run whose answers are the other side.
        benchmark: name under which that run answered these questions.
        judge: a GenRM; to measure what was not trained for, another judge than the training's.
        num_cases: use the first `num_cases`; None: all.
    """

    def __init__(self, shards: str, rival: str, benchmark: str, judge: GenRM, num_cases: int | None = None):
        super().__init__(shards, num_cases)
        if judge.pairs != "reference":
            raise ValueError(f"WinRate: judge.pairs is {judge.pairs!r}; accepted is 'reference', the rival's answer")
        self.rival, self.benchmark, self.judge = Path(rival), benchmark, judge

    def cases(self, limit: int | None = None) -> list[Case]:
        """Raises ValueError when the rival has not answered one of them."""
        if not self.rival.is_file():
            raise ValueError(f"WinRate: there is no {self.rival}; test the run whose answers it should hold first")
        rows = [json.loads(line) for line in self.rival.read_text(encoding="utf-8").splitlines()]
        said = {row["id"]: row["said"] for row in rows if row["benchmark"] == self.benchmark}
        found = super().cases(limit)
        for case in found:
            if case.id not in said:
                raise ValueError(
                    f"{self.rival} has no answer of benchmark {self.benchmark!r} to {case.id}; it has {len(said)}"
                )
            case.gold = {**case.gold, "reference": said[case.id]}
        return found

    def score(self, case: Case, text: str) -> float:
        return self.scores([(case, text)])[0]

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        """Raises ValueError when the judge gives no verdict after its retries: half a win rate would be a bias."""
        found: list[float] = []
        for case, text in pairs:  # one by one: answers to one case in one call would be a group
            completion = Completion(text=text, token_ids=[], truncated=False)
            (value,) = self.judge([Answered(prompt=case.prompt, completion=completion, case=case)])
            if value is None:
                raise ValueError(f"{case.id}: the judge gave no verdict, so there is no win rate")
            found.append(value)
        return found

    def is_readable(self, case: Case, text: str) -> bool:
        return bool(text.strip())
