"""Seven ways to score an answer, 0 to 1, by the sample's `answer_type`. What cannot be read scores 0."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .expression import is_equal
from .extract import boxed, coordinates, final_text, last_number, option_letter

if TYPE_CHECKING:
    from .benchmark import Case

COORDINATE_SPAN = 1000  # points and boxes are answered in 0-1000 of the image's width and height (Qwen-VL convention)


def exact(text: str, case: Case) -> float:
    """The whole answer, blind to case, surrounding space and a final full stop."""
    return float(_plain(final_text(text)) == _plain(case.answer))


def contains(text: str, case: Case) -> float:
    """The gold answer stands in the text as whole words."""
    return float(re.search(rf"(?<!\w){re.escape(_plain(case.answer))}(?!\w)", _plain(final_text(text))) is not None)


def letter(text: str, case: Case) -> float:
    """The chosen option's letter."""
    return float(option_letter(text) == case.answer.strip().upper())


def number(text: str, case: Case) -> float:
    """The last number in the text equals the gold number (1e-6 relative)."""
    said, gold = last_number(text), last_number(case.answer)
    if gold is None:
        raise ValueError(f"{case.id}: gold answer {case.answer!r} holds no number")
    return float(said is not None and abs(said - gold) <= 1e-6 * max(1.0, abs(gold)))


def math(text: str, case: Case) -> float:
    """Equal expressions, after the last '=' or inside the last \\boxed{}; plain text equality first."""
    said, gold = _expression(final_text(text)), _expression(case.answer)
    return float(said == gold or is_equal(said, gold))


def point(text: str, case: Case) -> float:
    """The point, in 0-1000 coordinates, lies in the gold region (borders count)."""
    said = coordinates(text, 2)
    if said is None:
        return 0.0
    x0, y0, x1, y1 = _gold_box(case)
    return float(x0 <= said[0] <= x1 and y0 <= said[1] <= y1)


def box(text: str, case: Case) -> float:
    """Intersection over union with the gold region, in 0-1000 coordinates; an empty or inverted box scores 0."""
    said = coordinates(text, 4)
    if said is None or said[2] <= said[0] or said[3] <= said[1]:
        return 0.0
    gold = _gold_box(case)
    width = min(said[2], gold[2]) - max(said[0], gold[0])
    height = min(said[3], gold[3]) - max(said[1], gold[1])
    overlap = max(0.0, width) * max(0.0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (said, gold)]
    return overlap / (sum(areas) - overlap)


SCORERS = {
    "exact": exact,
    "contains": contains,
    "letter": letter,
    "number": number,
    "math": math,
    "point": point,
    "box": box,
}


def score_answer(text: str, case: Case) -> float:
    """Score by the case's answer type. Raises ValueError for an unknown type, naming the accepted ones."""
    if case.answer_type not in SCORERS:
        raise ValueError(f"{case.id}: answer_type {case.answer_type!r} has no scorer; accepted: {', '.join(SCORERS)}")
    return SCORERS[case.answer_type](text, case)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()


def _gold_box(case: Case) -> tuple[float, float, float, float]:
    """The answer region in 0-1000 coordinates of its image."""
    region = next((r for r in case.regions if r.label == "answer"), None)
    if region is None:
        raise ValueError(f"{case.id}: a {case.answer_type} case needs a region labelled 'answer', it has none")
    sizes = [image.size for image in case.prompt.images] or case.gold["image_sizes"]
    width, height = sizes[region.image]
    x0, y0, x1, y1 = region.box
    return (
        x0 * COORDINATE_SPAN / width,
        y0 * COORDINATE_SPAN / height,
        x1 * COORDINATE_SPAN / width,
        y1 * COORDINATE_SPAN / height,
    )


def _expression(text: str) -> str:
    inside = boxed(text)
    return re.sub(r"\s+", "", (text if inside is None else inside).rsplit("=", 1)[-1].strip().strip("$").rstrip("."))
