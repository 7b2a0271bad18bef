"""Reading and short facts: the gold answer is looked for in what is said, or compared with it."""

from __future__ import annotations

import re

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import final_text

from .choice import words
from .hub import HubBenchmark, Judged, Row, asked, picture


class OCRBench(HubBenchmark):
    """OCRBench (1,000): right when a gold answer stands in the text, blind to case; formulas also to spaces."""

    repo, split = "echo840/OCRBench", "test"
    columns = ("image", "question", "answer", "question_type", "dataset")

    def read(self, row: Row, number: int) -> Case:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        return Case(
            id=str(number),
            prompt=asked(row["question"].strip(), [picture(row["image"], row)]),
            answer=str(answers[0]),
            answer_type="contains",
            group=row["question_type"],
            gold={"answers": [str(answer) for answer in answers], "is_formula": row["dataset"] == "HME100k"},
        )

    def score(self, case: Case, text: str) -> float:
        fold = _without_spaces if case.gold["is_formula"] else _one_line
        said = fold(final_text(text))
        return float(any(fold(answer) in said for answer in case.gold["answers"]))


class SimpleVQA(Judged):
    """SimpleVQA (2,025 facts about pictures): equal after case, articles and punctuation, or to a judge."""

    repo, split = "m-a-p/SimpleVQA", "test"
    columns = ("image", "question", "answer")

    def read(self, row: Row, number: int) -> Case:
        text = row["question"] + "\nAnswer the question using a single word or phrase."
        return Case(
            id=str(row.get("data_id", number)),
            prompt=asked(text, [picture(row["image"], row)]),
            answer=str(row["answer"]).strip(),
            answer_type="exact",
            group=str(row.get("language", "")),
        )

    def score(self, case: Case, text: str) -> float:
        return float(words(final_text(text)) == words(case.answer))


def _one_line(text: str) -> str:
    """Lower case, one line, full-width characters as ASCII ones."""
    wide = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
    return text.translate(wide).lower().strip().replace("\n", " ")


def _without_spaces(text: str) -> str:
    return re.sub(r"[ \n]", "", text.strip())
