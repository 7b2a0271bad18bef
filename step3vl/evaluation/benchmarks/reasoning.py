"""Reasoning over several images (ReMI) and physics (PhyX): text, numbers with a tolerance, or a letter."""

from __future__ import annotations

import json
import re
from typing import ClassVar

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import TAIL, final_text, last_number, stated

from .choice import Choice
from .hub import HubBenchmark, Row, asked, interleaved, is_given, letters, listed, picture


class ReMI(HubBenchmark):
    """ReMI (2,600 questions of 13 tasks, two to six images each), asked and scored as in its authors' notebook.

    Shapes and costs may be off by 3 %, clocks by ten minutes, a place is one of several, and all else is equal text or
    a number within 1 %.
    """

    repo, split = "mehrankazemi/ReMI", "test"
    columns = ("question", "image_1", "label", "task")
    ENDING: ClassVar[str] = (
        ' Output only a valid JSON string with two fields: "explanation" and "answer". Do not output anything else. '
        "The explanation field contains your reasoning. The answer field {}."
    )
    NUMERIC: ClassVar[str] = "contains the numeric value corresponding to your final answer"
    FORMS: ClassVar[dict[str, str]] = {
        "Collisions": f"{NUMERIC}. If it is a yes or no question, the answer field must be 0 for no and 1 for yes",
        "Isomorphism": "must be 1 if the two graphs are isomorphic and 0 otherwise",
        "CodeEdit": "contains the line of code corresponding to your final answer",
        "IQ": "contains the string corresponding to your final choice",
        "Schedule": "contains a string corresponding to your final answer",
        "Maps": "contains a string corresponding to your final answer",
        "Charts": "contains a string or numerical value corresponding to your final answer",
        "FuncRead": "contains a string or numeric value corresponding to your final answer",
    }
    MINUTES: ClassVar[int] = 10

    def read(self, row: Row, number: int) -> Case:
        task = str(row["task"])
        text = f"Question: {row['question'].strip()}" + self.ENDING.format(self.FORMS.get(task, self.NUMERIC))
        return Case(
            id=str(row.get("id", number)),
            prompt=interleaved(text, row, r"<image(\d+)>", "image_{}"),
            answer=str(row["label"]).strip(),
            answer_type="exact",
            group=task,
        )

    def score(self, case: Case, text: str) -> float:
        said, gold = _bare(answered(text)), _bare(case.answer)
        numbers = _number(said), (_number(gold) if re.fullmatch(r"[-+.\d]+", gold) else None)
        match case.group.lower():
            case "refcoco":
                return float(bool(said) and said in [place.strip() for place in gold.split(",")])
            case "clocks":
                return float(_near(*numbers, 0.0, self.MINUTES))
            case "geomshape" | "geomcost":
                return float(_near(*numbers, 0.03))
        same = said == gold or said.replace(" ", "") == gold.replace(" ", "") or said.removesuffix("(x)") == gold
        same = same or f"({said})" == gold or said == f"({gold})"
        return float(bool(said) and (same or _near(*numbers, 0.01)))

    def is_readable(self, case: Case, text: str) -> bool:
        return bool(answered(text))

    def vote(self, case: Case, text: str) -> str:
        return _bare(answered(text))


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


def answered(text: str) -> str:
    """The "answer" of the JSON object in a text, also of one that is not quite JSON; else what is boxed or stated."""
    said = final_text(text)[-TAIL:]
    try:
        return str(json.loads(said[said.index("{") : said.rindex("}") + 1])["answer"]).strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        fields = re.findall(r'"answer"\s{0,9}:\s{0,9}("(?:[^"\\\n]|\\.)*"|[^,}\n]+)', said)
        return fields[-1].strip().strip('"') if fields else stated(text)


def _bare(text: str) -> str:
    """In lower case, without backslashes, and without what follows a per cent sign."""
    return text.lower().replace("\\", "").split("%")[0].strip()


def _number(text: str) -> float | None:
    """The number that a text is, or the only one in it, as in "12 cm"."""
    try:
        return float(text)
    except ValueError:
        return last_number(text) if len(re.findall(r"\d+(?:[.,]\d+)*", text)) == 1 else None


def _near(said: float | None, gold: float | None, share: float, more: float = 1e-9) -> bool:
    return said is not None and gold is not None and abs(said - gold) <= share * abs(gold) + more
