"""Reward for multiple choice: the letter that is chosen, or the option that is repeated."""

from __future__ import annotations

from step3vl.evaluation.benchmarks.choice import chosen
from step3vl.evaluation.extract import option_letter

from .base import Answered, EachAnswer


class Choice(EachAnswer):
    """1 for the gold letter, else 0. With gold["options"], repeating the right option's text is the letter too."""

    name = "choice"

    def score(self, rollout: Answered) -> float:
        case, gold = rollout.case, rollout.case.answer.strip().upper()
        if len(gold) != 1 or not "A" <= gold <= "J":
            raise ValueError(f"{case.id}: gold answer {case.answer!r} is no option letter; accepted are A to J")
        said = chosen(rollout.text, case) if case.gold.get("options") else option_letter(rollout.text)
        return float(said == gold)
