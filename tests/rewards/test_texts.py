"""Letters, numbers, mathematics and text."""

import difflib
import pickle
import random
import time

import pytest

from step3vl.rewards import Choice, Contains, EditSimilarity, Exact, Expression, MathVerify, Number
from step3vl.rewards.reading import edit_distance, similarity

from .answers import answered, one


def plain_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_letters():
    said = {"B": 1, "The answer is (b).": 1, "\\boxed{B}": 1, "A": 0, "A or B": 0, "": 0, "<think>B": 0, "a cat": 0}
    assert {text: one(Choice(), answered(text, "B")) for text in said} == said
    options = {"options": ["a dog", "a cat"]}
    assert one(Choice(), answered("A cat.", "B", gold=options)) == 1.0
    assert one(Choice(), answered("a dog", "B", gold=options)) == 0.0
    with pytest.raises(ValueError, match="'7' is no option letter"):
        Choice()([answered("B", "7")])


def test_numbers():
    said = {"7": 1, "It is 7.0 cm": 1, "\\boxed{7}": 1, "7.001": 0, "-7": 0, "seven": 0, "": 0, "<think>7": 0}
    assert {text: one(Number(), answered(text, "7")) for text in said} == said
    for reward, right, wrong in [
        (Number(relative=0.05, absolute=0), ("95", "105"), ("94.9", "105.1")),
        (Number(relative=0, absolute=2), ("98", "102"), ("97.9", "102.1")),
        (Number(relative=0.01, absolute=5), ("95", "105"), ("94.9", "105.1")),
    ]:
        assert [one(reward, answered(text, "100")) for text in (*right, *wrong)] == [1, 1, 0, 0]
    errors = [one(Number(relative=0.1), answered(str(100 + k), "100")) for k in range(0, 30)]
    assert errors == sorted(errors, reverse=True), "falls with the error"
    with pytest.raises(ValueError, match="holds no number"):
        Number()([answered("7", "seven")])
    with pytest.raises(ValueError, match="relative is -1"):
        Number(relative=-1)


def test_edit_distance_is_the_table():
    draw = random.Random(0)
    for _ in range(400):
        a, b = ("".join(draw.choices("abc ", k=draw.randint(0, 90))) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == plain_distance(a, b)
        assert 0.0 <= similarity(a, b) <= 1.0 and (similarity(a, b) == 1.0) == (a == b)
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and similarity("", "") == 1.0
    assert difflib.SequenceMatcher(None, "abcdef", "abzdef").ratio() == pytest.approx(similarity("abcdef", "abzdef"))


def test_reading():
    reward = EditSimilarity()
    gold = "The cat sat\non the mat."
    assert one(reward, answered("<think>hm</think>The  cat sat on the mat.", gold)) == 1.0
    worse = [gold, gold[:-1], gold[:-5], gold[:5], ""]
    values = reward([answered(text, gold) for text in worse])
    assert values == sorted(values, reverse=True) and values[-1] == 0.0 and len(set(values)) == 5
    assert one(reward, answered("two", "one", gold={"answers": ["one", "two"]})) == 1.0
    assert one(reward, answered(gold + "x" * 400, gold)) == 0.0
    assert one(EditSimilarity(max_characters=10), answered(gold, gold)) is None
    with pytest.raises(ValueError, match="max_characters is 0"):
        EditSimilarity(0)


def test_the_longest_texts_are_compared_in_time():
    draw = random.Random(0)
    gold, said = ("".join(draw.choices("abcdefgh", k=k)) for k in (5000, 20_000))
    start = time.thread_time()
    assert 0.1 < one(EditSimilarity(), answered(said, gold)) < 0.3
    assert time.thread_time() - start < 2, "quadratic in Python would take minutes"


def test_exact_and_contained():
    assert [one(Exact(), answered(text, "A cat")) for text in ("a  cat.", "cat", "", "<think>a cat")] == [1, 0, 0, 0]
    assert one(Exact(), answered("red", "x", gold={"answers": ["blue", "red"]})) == 1.0
    assert [one(Contains(), answered(text, "cat")) for text in ("A cat!", "concat", "")] == [1, 0, 0]
    assert one(Contains(max_words=5), answered("dog cow cat pig hen owl", "cat")) == 0.0, "a list of everything"


def test_expressions():
    said = {"1+x": 1, "f(x) = x + 1": 1, "\\boxed{x+1}": 1, "x+2": 0, "": 0, "<think>x+1": 0}
    assert {text: one(Expression(), answered(text, "x + 1")) for text in said} == said


class TestMathVerify:
    @pytest.fixture(scope="class")
    def reward(self):
        pytest.importorskip("math_verify", reason="math-verify is optional: pip install 'step3vl[rl]'")
        reward = MathVerify(num_workers=2, timeout_s=0.5)
        reward([answered("4", "4")] * 4)
        yield reward
        reward.close()

    def test_equal_or_not(self, reward):
        said = {"\\boxed{\\frac{3}{6}}": 1, "so $0.5$": 1, "$0.6$": 0, "": 0, "<think>$0.5$": 0}
        assert dict(zip(said, reward([answered(text, "1/2") for text in said]))) == said

    def test_late_answers_are_wrong_or_dropped_and_counted(self, reward):
        hang, before = "$9^{9^{9^{9^9}}}$", reward.counts["timeouts"]
        assert reward([answered("$7$", "7"), answered(hang, "7"), answered("$8$", "7")]) == [1, 0, 0]
        assert reward.counts["timeouts"] == before + 1
        reward.late = "drop"
        assert reward([answered(hang, "7"), answered("$7$", "7")]) == [None, 1]
        reward.late = "zero"
        assert reward.counts["timeouts"] == before + 2

    def test_a_case_without_gold_is_refused(self, reward):
        with pytest.raises(ValueError, match="c: the gold answer is empty"):
            reward([answered("$7$", " ")])

    def test_outages_and_no_answers(self, reward):
        assert reward([]) == []
        assert reward([answered("", "7", error="503")]) == [None]

    def test_it_travels_without_its_processes(self, reward):
        copy = pickle.loads(pickle.dumps(reward))
        assert copy([answered("$7$", "7")]) == [1]
        copy.close()


def test_refusals():
    with pytest.raises(ValueError, match="late is 'never'"):
        MathVerify(late="never")
    with pytest.raises(ValueError, match="num_workers >= 1"):
        MathVerify(num_workers=0)
    with pytest.raises(ValueError, match="max_words is 0"):
        Contains(0)
