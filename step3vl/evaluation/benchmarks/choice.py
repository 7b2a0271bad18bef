"""Multiple choice: the answer is a letter, or the text of an option; what cannot be read is wrong, never guessed.

lmms-eval draws a random letter where nothing is found, VLMEvalKit asks a judge; ours scores 0 and reports the rate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import final_text, last_number, option_letter, stated
from step3vl.evaluation.runner import Record

from .hub import HubBenchmark, Row, asked, interleaved, is_given, lettered, letters, listed, picture

DIRECTLY = "Answer with the option's letter from the given choices directly."


ARTICLES = {"a", "an", "the"}


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def words(text: str) -> list[str]:
    """Words without articles, case and punctuation."""
    return [word for word in plain(text).split() if word not in ARTICLES]


def chosen(text: str, case: Case) -> str | None:
    """The letter that an answer names, or whose option it, or what it states, repeats; None: neither."""
    options: Sequence[str] = case.gold["options"]
    letter = option_letter(text)
    if letter in letters(len(options)):
        return letter
    for said in (final_text(text), stated(text)):
        same = [letter for letter, option in zip(letters(len(options)), options) if plain(said) == plain(str(option))]
        same = same or [x for x, option in zip(letters(len(options)), options) if words(said) == words(str(option))]
        if plain(said) and len(same) == 1:
            return same[0]
    return None


class Choice(HubBenchmark):
    """Scores a letter."""

    def score(self, case: Case, text: str) -> float:
        return float(chosen(text, case) == case.answer)

    def is_readable(self, case: Case, text: str) -> bool:
        return chosen(text, case) is not None

    def case(self, id: str, row: Row, text: str, answer: str, options: Sequence[str], group: str = "") -> Case:
        """A case with one image in front."""
        return Case(
            id=id,
            prompt=asked(text, [picture(row["image"], row)]),
            answer=answer,
            answer_type="letter",
            group=group,
            gold={"options": [str(option) for option in options]},
        )


def columns_options(row: Row, names: str) -> list[str]:
    """Options in columns A, B, C ... that are given."""
    return [str(row[name]) for name in names if is_given(row.get(name))]


class MMStar(Choice):
    """MMStar (1,500). The score is the mean over the eighteen finer categories."""

    repo, split = "Lin-Chen/MMStar", "val"
    columns = ("index", "image", "question", "answer", "category", "l2_category")

    def read(self, row: Row, number: int) -> Case:
        text = row["question"].strip() + "\nAnswer with the option's letter from the given choices directly"
        return self.case(str(row["index"]), row, text, row["answer"].strip(), letters(4), row["l2_category"])

    def headline(self, records: Sequence[Record]) -> float:
        return mean_of_groups(records)


class MMBench(Choice):
    """MMBench EN, dev split, without circular passes and without a judge."""

    repo, config, split = "lmms-lab-encoder/MMBench", "en", "dev"
    columns: ClassVar[tuple[str, ...]] = ("index", "image", "question", "hint", "A", "B", "answer", "category")

    def read(self, row: Row, number: int) -> Case:
        options = columns_options(row, "ABCDE")
        listing = "There are several options:\n" + "".join(f"{x}. {o}\n" for x, o in zip(letters(9), options))
        hint = f"{row['hint']} " if is_given(row["hint"]) else ""
        text = f"{hint}{row['question']} {listing}\n\n{DIRECTLY}"
        return self.case(str(row["index"]), row, text, row["answer"].strip(), options, row["category"])


class CCBench(MMBench):
    """CCBench, questions on Chinese culture, with MMBench's columns."""

    repo, config, split = "lmms-lab/CCBench", "", "test"
    columns = ("index", "image", "question", "A", "B", "answer", "category")

    def read(self, row: Row, number: int) -> Case:
        return super().read({"hint": None, **row}, number)


class AI2D(Choice):
    """AI2D (3,088 diagrams); the answer column is the number of the option."""

    repo, split = "lmms-lab-encoder/ai2d", "test"
    columns = ("image", "question", "options", "answer")

    def read(self, row: Row, number: int) -> Case:
        options = listed(row["options"])
        text = f"{row['question']}\n{lettered(options)}\n{DIRECTLY}"
        return self.case(str(number), row, text, letters(len(options))[int(row["answer"])], options)


class VStar(Choice):
    """V* (191 small details in large images); options stand in the question."""

    repo, split = "lmms-lab-encoder/vstar-bench", "test"
    columns = ("image", "text", "label", "category")

    def read(self, row: Row, number: int) -> Case:
        options = re.findall(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)", row["text"].partition("\nAnswer with")[0])
        question = row["text"].partition("(A)")[0].strip()
        text = f"{question}\n{lettered(options)}\n{DIRECTLY}"
        return self.case(str(number), row, text, row["label"].strip(), options, row["category"])


class MMVP(Choice):
    """MMVP (300, in pairs); the score is the share of pairs of which both are right."""

    repo, split = "lmms-lab-eval/MMVP", "test"
    columns = ("Index", "image", "Question", "Options", "Correct Answer")

    def read(self, row: Row, number: int) -> Case:
        options = [text.strip() for text in re.split(r"\([a-z]\)", row["Options"]) if text.strip()]
        text = f"{row['Question']}\n{lettered(options)}\n{DIRECTLY}"
        pair = (int(row["Index"]) - 1) // 2
        answer = row["Correct Answer"].strip(" ()").upper()
        return self.case(str(row["Index"]), row, text, answer, options, f"pair {pair}")

    def headline(self, records: Sequence[Record]) -> float:
        return float(np.mean([min(scores) for scores in by_group(records).values()]))

    def breakdown(self, records: Sequence[Record]) -> dict[str, float]:
        return {"single": float(np.mean([record.score for record in records]))}


class MMMU(Choice):
    """MMMU validation (900, thirty subjects); a few questions are open."""

    repo, split = "lmms-lab-encoder/MMMU", "validation"
    columns = ("id", "question", "options", "question_type", "answer", "image_1")
    SHORTLY: ClassVar[str] = "Answer the question using a single word or phrase."

    def read(self, row: Row, number: int) -> Case:
        is_choice = row["question_type"] == "multiple-choice"
        options = listed(row["options"]) if is_choice else []
        ending = f"\n{lettered(options)}\n\n{DIRECTLY}" if is_choice else f"\n\n{self.SHORTLY}"
        golds = listed(row["answer"]) if str(row["answer"]).startswith("[") else [row["answer"]]
        subject = re.match(r"[a-z]+_(.+?)_\d+$", row["id"])
        return Case(
            id=row["id"],
            prompt=interleaved(row["question"] + ending, row, r"<image (\d+)>", "image_{}"),
            answer=str(golds[0]),
            answer_type="letter" if is_choice else "contains",
            group=subject[1] if subject else "",
            gold={"options": [str(option) for option in options], "answers": [str(gold) for gold in golds]},
        )

    def score(self, case: Case, text: str) -> float:
        if case.answer_type == "letter":
            return super().score(case, text)
        said = final_text(text)
        return float(any(open_match(said, gold) for gold in case.gold["answers"]))

    def is_readable(self, case: Case, text: str) -> bool:
        return super().is_readable(case, text) if case.answer_type == "letter" else bool(final_text(text))


def open_match(said: str, gold: str) -> bool:
    """A number that is equal to two decimals, or the gold's words in the last sentence that is not empty."""
    if (number := last_number(gold)) is not None and re.fullmatch(r"[-+\d.,/%$ ]+", gold.strip()):
        found = last_number(said)
        return found is not None and round(found, 2) == round(number, 2)
    lines = [line for line in said.splitlines() if line.strip()]
    return bool(lines) and f" {plain(gold)} " in f" {plain(lines[-1])} "


class BLINK(HubBenchmark):
    """BLINK validation (1,901, fourteen perception tasks, one to four images)."""

    repo, split = "BLINK-Benchmark/BLINK", "val"
    columns = ("idx", "image_1", "prompt", "choices", "answer", "sub_task")

    def read(self, row: Row, number: int) -> Case:
        images = [
            picture(row[f"image_{n}"], row, f"image_{n}") for n in range(1, 5) if row.get(f"image_{n}") is not None
        ]
        options = listed(row["choices"])
        return Case(
            id=str(row["idx"]),
            prompt=asked(f"{row['prompt']}\n{DIRECTLY}", images),
            answer=row["answer"].strip(" ()"),
            answer_type="letter",
            group=row["sub_task"],
            gold={"options": [str(option) for option in options]},
        )

    score, is_readable = Choice.score, Choice.is_readable


class AllAngles(HubBenchmark):
    """All-Angles-Bench (2,132 questions on one to five views of a scene)."""

    repo, split = "ch-chenyu/All-Angles-Bench", "data"
    columns = ("index", "image_path", "question", "A", "B", "answer", "category")

    def read(self, row: Row, number: int) -> Case:
        paths = listed(row["image_path"])
        options = columns_options(row, "ABC")
        text = f"{row['question']}\n{lettered(options)}\n{DIRECTLY}"
        return Case(
            id=str(row["index"]),
            prompt=asked(text, [picture(path, row, str(path)) for path in paths]),
            answer=row["answer"].strip(),
            answer_type="letter",
            group=row["category"],
            gold={"options": options},
        )

    score, is_readable = Choice.score, Choice.is_readable


def by_group(records: Sequence[Record]) -> Mapping[str, list[float]]:
    """Scores by the group of their case."""
    groups: dict[str, list[float]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record.score)
    return groups


def mean_of_groups(records: Sequence[Record]) -> float:
    """The mean of the groups' means: each group counts once, whatever its size."""
    return float(np.mean([np.mean(scores) for scores in by_group(records).values()]))
