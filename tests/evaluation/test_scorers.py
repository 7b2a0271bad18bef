"""Every scorer on answers as models phrase them."""

import pytest
from PIL import Image

from step3vl.data.schema import ANSWER_TYPES
from step3vl.evaluation import Case
from step3vl.evaluation.extract import coordinates, final_text, last_number, option_letter
from step3vl.evaluation.scorers import SCORERS, score_answer
from step3vl.types import Message, Prompt, Region

BOX = (16, 32, 32, 64)  # in a 64 x 128 image: x 250..500, y 250..500 in thousandths


def case(answer, answer_type, regions=()):
    prompt = Prompt(messages=[Message(role="user", content="<image>?")], images=[Image.new("RGB", (64, 128))])
    return Case(id="c", prompt=prompt, answer=answer, answer_type=answer_type, regions=list(regions))


GOLD = [Region(label="other", box=(0, 0, 1, 1)), Region(label="answer", box=BOX)]


@pytest.mark.parametrize(
    "kind, gold, text, score",
    [
        ("exact", "471", "471", 1),
        ("exact", "471", " 471. ", 1),
        ("exact", "471", "<think>472?</think>\n471", 1),
        ("exact", "Red Circle", "red  circle", 1),
        ("exact", "471", "4711", 0),
        ("exact", "471", "", 0),
        ("contains", "cat", "It is a cat, I think", 1),
        ("contains", "cat", "a category", 0),
        ("contains", "C++", "written in C++ today", 1),
        ("letter", "B", "B", 1),
        ("letter", "B", "(b)", 1),
        ("letter", "B", "The answer is B.", 1),
        ("letter", "B", "A is wrong, so the answer: **B**", 1),
        ("letter", "B", "A cat sat", 0),
        ("letter", "B", "I do not know", 0),
        ("number", "7", "3 + 4 = 7", 1),
        ("number", "1200", "about 1,200", 1),
        ("number", "0.75", "3/4", 1),
        ("number", "-2", "x = -2", 1),
        ("number", "7", "seven", 0),
        ("number", "7", "1/0", 0),
        ("math", "2*x + 1", "1+2x", 1),
        ("math", "x**2", "y = x^2", 1),
        ("math", "1/2", "\\boxed{0.5}", 1),
        ("math", "x+1", "x-1", 0),
        ("math", "x", "9^9^9^9", 0),
        ("math", "x", "__import__('os')", 0),
        ("math", "x", "((((", 0),
        ("point", "(375, 375)", "(300, 400)", 1),
        ("point", "(375, 375)", "[250, 500]", 1),
        ("point", "(375, 375)", "x=251 y=499", 1),
        ("point", "(375, 375)", "(249, 400)", 0),
        ("point", "(375, 375)", "(300, 400, 500)", 0),
        ("point", "(375, 375)", "there", 0),
        ("box", "", "[250, 250, 500, 500]", 1),
        ("box", "", "[250, 250, 500, 375]", 0.5),
        ("box", "", "[0, 0, 1000, 1000]", 1 / 16),
        ("box", "", "[500, 500, 250, 250]", 0),
        ("box", "", "[600, 600, 700, 700]", 0),
        ("box", "", "250 250", 0),
    ],
)
def test_score(kind, gold, text, score):
    assert score_answer(text, case(gold, kind, GOLD)) == pytest.approx(score)


def test_scorers_are_the_answer_types_of_the_schema():
    assert set(SCORERS) == set(ANSWER_TYPES)


def test_unknown_type_and_missing_region_are_named():
    with pytest.raises(ValueError, match="answer_type 'essay' has no scorer; accepted: exact"):
        score_answer("x", case("x", "essay"))
    with pytest.raises(ValueError, match="c: a point case needs a region labelled 'answer'"):
        score_answer("(1, 2)", case("(1, 2)", "point"))


def test_extraction():
    assert final_text("<think>a</think> b") == "b" and final_text("a") == "a"
    assert option_letter("Answer: C") == "C" and option_letter("It is I.") is None
    assert last_number("from 3 to -4.5") == -4.5 and last_number("none") is None
    assert coordinates("first (1, 2) then (3, 4)", 2) == (3.0, 4.0) and coordinates("1 2 3", 2) is None
