"""Mathematics, in text or with a figure: the last boxed or stated answer, compared as mathematics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import boxed, final_text, last_number, option_letter
from step3vl.evaluation.math_pool import verify

from .choice import DIRECTLY, chosen
from .hub import HubBenchmark, Judged, Row, asked, is_given, lettered, letters, listed, picture

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Answer the question with the option's letter from the given choices directly."
LONGEST_EXPRESSION = 100
"""Characters."""
SOLVE = 'Please solve the problem step by step and put your answer in one "\\boxed{}".'


class Mathematics(HubBenchmark):
    """Scores equality as math-verify sees it; what runs into its time limit is wrong, and counted as unreadable."""

    def stream(self, limit: int | None = None) -> Iterator[Case]:
        if find_spec("math_verify") is None:
            raise ValueError(f"{type(self).__name__} compares answers with math-verify: pip install 'step3vl[eval]'")
        return super().stream(limit)

    def score(self, case: Case, text: str) -> float:
        return self.scores([(case, text)])[0]

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        return [float(found) for found in equal([(text, case.answer) for case, text in pairs])]

    def is_readable(self, case: Case, text: str) -> bool:
        said = final_text(text)  # an answer without a box or a number may still be an expression, but not a paragraph
        return boxed(text) is not None or last_number(text) is not None or 0 < len(said) < LONGEST_EXPRESSION


class AIME2025(Mathematics):
    """AIME 2025 (30 problems; answers are whole numbers from 0 to 999)."""

    repo, split = "simplescaling/aime25_nofigures", "train"
    columns = ("problem", "answer")

    def read(self, row: Row, number: int) -> Case:
        text = f"{row['problem'].strip()}\n\n{BOXED}"
        answer = str(row["answer"]).strip()
        return Case(id=str(row.get("id", number)), prompt=asked(text, []), answer=answer, answer_type="number")

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        return [float(_stated_number(text) == float(case.answer)) for case, text in pairs]


class HMMT2025(Mathematics):
    """HMMT February 2025 (30 problems; answers in LaTeX)."""

    repo, split = "MathArena/hmmt_feb_2025", "train"
    columns = ("problem", "answer")

    def read(self, row: Row, number: int) -> Case:
        text = f"{row['problem'].strip()}\n\n{BOXED}"
        id = str(row.get("problem_idx", number))
        return Case(id=id, prompt=asked(text, []), answer=str(row["answer"]).strip(), answer_type="math")


class MathVision(Mathematics):
    """MathVision (3,040 problems of competitions, each with a figure)."""

    repo, split = "MathLLMs/MathVision", "test"
    columns = ("id", "decoded_image", "question", "options", "answer", "subject")

    def read(self, row: Row, number: int) -> Case:
        options = [str(option) for option in listed(row["options"])]
        question = re.sub(r"<image\d+>", "", row["question"])
        text = SOLVE + question
        if options:
            text += f"\nChoices: {lettered(options)}\n{LETTER}"
        return Case(
            id=str(row["id"]),
            prompt=asked(text, [picture(row["decoded_image"], row)]),
            answer=str(row["answer"]).strip(),
            answer_type="letter" if options else "math",
            group=str(row["subject"]),
            gold={"options": options},
        )

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        """A letter where there are options, or the value of the right one; otherwise equality."""
        found = [float(bool(case.gold["options"]) and chosen(text, case) == case.answer) for case, text in pairs]
        left = [i for i, (case, text) in enumerate(pairs) if not found[i] and not _names_an_option(case, text)]
        values = [(pairs[i][1], _value(pairs[i][0])) for i in left]
        for i, verdict in zip(left, equal(values)):
            found[i] = float(verdict)
        return found


class MathVista(Judged):
    """MathVista testmini (1,000): letters, whole numbers, decimals, lists.

    The public harnesses let a language model find the answer in the text; the rules take the boxed, stated or last one.
    """

    repo, split = "AI4Math/MathVista", "testmini"
    columns = (
        "pid",
        "question",
        "decoded_image",
        "choices",
        "unit",
        "precision",
        "answer",
        "question_type",
        "answer_type",
    )

    def read(self, row: Row, number: int) -> Case:
        options = [str(option) for option in listed(row["choices"])]
        unit = f" (Unit: {row['unit']})" if is_given(row["unit"]) else ""
        parts = [row["question"] + unit, *([lettered(options)] if options else []), _hint(row)]
        is_choice = row["question_type"] == "multi_choice"
        answer = str(row["answer"])
        return Case(
            id=str(row["pid"]),
            prompt=asked("\n".join(parts), [picture(row["decoded_image"], row)]),
            answer=letters(len(options))[options.index(answer)] if is_choice else answer,
            answer_type="letter" if is_choice else "number",
            group=str(row["answer_type"]),
            gold={"options": options, "precision": int(row["precision"] or 0)},
        )

    def score(self, case: Case, text: str) -> float:
        if case.answer_type == "letter":
            return float(chosen(text, case) == case.answer)
        if case.group == "list":
            return float(_numbers(_stated(text)) == _numbers(case.answer))
        said = _stated_number(text)
        if said is None:
            return 0.0
        if case.group == "integer":
            return float(int(said) == int(float(case.answer)))
        return float(round(said, case.gold["precision"]) == float(case.answer))

    def is_readable(self, case: Case, text: str) -> bool:
        return chosen(text, case) is not None if case.answer_type == "letter" else _stated_number(text) is not None


def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether each text says what its gold is, to math-verify.

    It reads several boxes as several answers, and no expression without dollars. So where it says no it is asked again
    with the last box alone, or with the whole of a short answer.
    """
    found = [verdict is True for verdict in verify(pairs)]
    again = [(i, said) for i, (text, _) in enumerate(pairs) if not found[i] and (said := _expression(text))]
    for (i, _), verdict in zip(again, verify([(f"${said}$", pairs[i][1]) for i, said in again]) if again else []):
        found[i] = verdict is True
    return found


def _expression(text: str) -> str:
    """The last box's content, or a short answer, without words; "" for anything else."""
    inner = boxed(text)
    said = (final_text(text) if inner is None else inner).strip().rstrip(".")
    has_words = re.search(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", "", said)) is not None
    return said if len(said) <= LONGEST_EXPRESSION and "$" not in said and not has_words else ""


def _hint(row: Row) -> str:
    if row["question_type"] == "multi_choice":
        return DIRECTLY
    match row["answer_type"], int(row["precision"] or 0):
        case "integer", _:
            return "Answer the question using a single integer number."
        case "float", 1:
            return "Answer the question using a single floating-point number with one decimal place."
        case "float", _:
            return "Answer the question using a single floating-point number with two decimal places."
    return "Answer the question using a Python list."


def _stated(text: str) -> str:
    """The last boxed content, or the final text."""
    inner = boxed(text)
    return final_text(text) if inner is None else inner


def _stated_number(text: str) -> float | None:
    inner = boxed(text)
    found = last_number(inner) if inner is not None else None
    return last_number(text) if found is None else found


def _numbers(text: str) -> list[float]:
    """The numbers of the last bracketed list in the text."""
    found = re.findall(r"\[([^\[\]]*)\]", text)
    return [float(value) for value in re.findall(r"-?\d+(?:\.\d+)?", found[-1] if found else text)]


def _names_an_option(case: Case, text: str) -> bool:
    return bool(case.gold["options"]) and option_letter(text) in letters(len(case.gold["options"]))


def _value(case: Case) -> str:
    """What the right option says, or the answer itself."""
    options = case.gold["options"]
    return options[letters(len(options)).index(case.answer)] if options else case.answer
