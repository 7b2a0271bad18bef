"""Reasoning over several images (ReMI) and physics (PhyX): text, numbers with a tolerance, times, or a letter."""

from __future__ import annotations

import re
from typing import ClassVar

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import boxed, final_text, last_number

from .choice import Choice, plain
from .hub import HubBenchmark, Row, asked, interleaved, is_given, letters, listed, picture


class ReMI(HubBenchmark):
    """ReMI (2,600 questions of 13 tasks, two to six images each).

    Text is compared after case and punctuation; numbers may be off by `tolerances` of the gold; clocks by ten minutes.
    The released rules could not be compared with: row names are those of the dataset's card.
    """

    repo, split = "mehrankazemi/ReMI", "test"
    columns = ("question", "image_1", "label", "task")
    tolerances: ClassVar[dict[str, float]] = {"Charts": 0.03, "GeomCost": 0.01, "GeomShape": 0.01, "FuncRead": 0.03}
    MINUTES: ClassVar[int] = 10

    def read(self, row: Row, number: int) -> Case:
        text = row["question"].strip() + "\nEnd with: The answer is ANSWER."
        return Case(
            id=str(row.get("id", number)),
            prompt=interleaved(text, row, r"<image(\d+)>", "image_{}"),
            answer=str(row["label"]).strip(),
            answer_type="exact",
            group=str(row["task"]),
        )

    def score(self, case: Case, text: str) -> float:
        said = stated(text)
        if case.group == "Clocks":
            times = _minutes(said), _minutes(case.answer)
            if None not in times:
                apart = abs(times[0] - times[1]) % 720  # type: ignore[operator]  # a dial shows twelve hours
                return float(min(apart, 720 - apart) <= self.MINUTES)
        gold = last_number(case.answer) if re.fullmatch(r"[-+$\d.,%/ ]+", case.answer) else None
        if gold is not None:
            found = last_number(said)
            limit = self.tolerances.get(case.group, 0.0) * abs(gold) + 1e-9
            return float(found is not None and abs(found - gold) <= limit)
        return float(plain(said) == plain(case.answer))


class PhyX(Choice):
    """PhyX, multiple choice (physics in figures), without a judge."""

    repo, config, split = "Cloudriver/PhyX", "data_for_llms_eval", "phyx_mc"
    columns = ("index", "image", "question", "answer", "category")

    def read(self, row: Row, number: int) -> Case:
        given = listed(row["options"]) if is_given(row.get("options")) else letters(4)
        options = [re.sub(r"^[A-Z][:.]\s*", "", str(option)) for option in given]
        return Case(
            id=str(row["index"]),
            prompt=asked(row["question"], [picture(row["image"], row)]),
            answer=str(row["answer"]).strip(),
            answer_type="letter",
            group=str(row["category"]),
            gold={"options": options},
        )


def stated(text: str) -> str:
    """What stands in the last box, or after the last "the answer is" or "answer:", else the last line."""
    inner = boxed(text)
    if inner is not None:
        return inner
    said = final_text(text)
    parts = re.split(r"(?i)\banswer(?:\s+is)?\s*:?\s*", said)
    lines = (parts[-1] if len(parts) > 1 else said).strip().splitlines()
    return (lines[0] if len(parts) > 1 and lines else lines[-1] if lines else "").strip().rstrip(".")


def _minutes(text: str) -> int | None:
    """Minutes of a time such as 4:35."""
    found = re.findall(r"(\d{1,2}):(\d{2})", text)
    return 60 * int(found[-1][0]) + int(found[-1][1]) if found else None
