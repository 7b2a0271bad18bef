"""Counting: the answer is a whole number."""

from __future__ import annotations

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import last_number

from .hub import HubBenchmark, Row, asked, picture

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class CountBench(HubBenchmark):
    """CountBenchQA (491 pictures of two to ten things)."""

    repo, split = "vikhyatk/CountBenchQA", "test"
    columns = ("image", "question", "number")

    def read(self, row: Row, number: int) -> Case:
        text = row["question"].strip() + "\nAnswer with a single number."
        return Case(
            id=str(number),
            prompt=asked(text, [picture(row["image"], row)]),
            answer=str(int(row["number"])),
            answer_type="number",
        )

    def score(self, case: Case, text: str) -> float:
        return float(count(text) == int(case.answer))

    def is_readable(self, case: Case, text: str) -> bool:
        return count(text) is not None


def count(text: str) -> float | None:
    """The last number, in digits, or the last in words up to ten."""
    found = last_number(text)
    if found is not None:
        return found
    named = [word for word in text.lower().replace(".", " ").split() if word in NAMES]
    return float(NAMES.index(named[-1])) if named else None
