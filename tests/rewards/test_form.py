"""Form, repetition, length, language, citations, confidence."""

import pytest

from step3vl.rewards import (
    BoxedOnce,
    Calibration,
    Citations,
    Exact,
    LanguageConsistency,
    Pattern,
    Repetition,
    SoftOverlong,
    ThinkOnce,
)
from step3vl.rewards.behaviour import confidence, scripts

from .answers import answered, one


def by_text(reward, said, **more):
    assert {text: one(reward, answered(text, **more)) for text in said} == pytest.approx(said)


def test_thinking_once():
    good = {"<think>a</think>b": 1, "\n<think>\na\n</think>\n\nb": 1}
    bad = ["b", "", "<think>a", "<think>a</think>", "<think> </think>b", "x<think>a</think>b", "a</think>b"]
    bad += [
        "<think>a</think>b</think>",
        "<think><think>a</think>b",
        "<think>a</think><think>b</think>c",
        "</think>a<think>",
    ]
    by_text(ThinkOnce(), good | dict.fromkeys(bad, 0))
    by_text(ThinkOnce(opened=True), {"a</think>b": 1, "<think>a</think>b": 0, "b": 0, "</think>b": 0, "a</think>": 0})


def test_boxed_once():
    bad = [
        "7",
        "",
        "\\boxed{}",
        "\\boxed{ }",
        "\\boxed{7",
        "\\boxed{7} \\boxed{8}",
        "<think>\\boxed{7}",
        "<think>\\boxed{7}</think>7",
    ]
    by_text(
        BoxedOnce(), {"so \\boxed{7}": 1, "<think>\\boxed{6}</think>\\boxed{\\frac{1}{2}}": 1} | dict.fromkeys(bad, 0)
    )


def test_patterns():
    by_text(Pattern(r"Answer: \d+"), {"Answer: 7": 1, "so\nAnswer: 7.": 1, "7": 0, "<think>Answer: 7</think>7": 0})
    by_text(Pattern(r"Answer: \d+", match="whole"), {"Answer: 7": 1, "Answer: 7.": 0})
    by_text(Pattern(r"wait", part="all"), {"<think>wait</think>7": 1, "7": 0})
    by_text(Pattern(r"^a", max_characters=2), {"baa": 1, "abb": 0})
    with pytest.raises(ValueError, match="is no regular expression"):
        Pattern("(")
    with pytest.raises(ValueError, match="accepted are search or whole"):
        Pattern("a", match="first")


def test_repetition():
    def value(ids, n=3):
        return one(Repetition(n), answered("x", token_ids=ids))

    assert value([1, 2, 3, 4, 5]) == value([1, 2]) == 0.0
    assert value([1] * 12) == pytest.approx(1 / 10 - 1)
    assert value([1, 2, 3, 1, 2, 3]) == pytest.approx(3 / 4 - 1)
    assert value([1, 2, 1, 2], n=1) == pytest.approx(-0.5)
    values = [value([*range(20), *[7] * k]) for k in range(3, 60, 4)]
    assert values == sorted(values, reverse=True) and -1 < values[-1] < values[0] <= 0, "grows with the repetition"
    assert value(list(range(5)) * 4) == value([k + 9 for k in range(5)] * 4), "blind to which tokens"
    assert value([]) is None and one(Repetition(), answered("")) == 0.0
    with pytest.raises(ValueError, match="n is 0"):
        Repetition(0)


def test_soft_overlong():
    reward = SoftOverlong(max_tokens=100, margin_tokens=20)
    expected = {0: 0, 80: 0, 81: -0.05, 90: -0.5, 100: -1, 500: -1}
    assert {n: one(reward, answered("x" if n else "", num_tokens=n)) for n in expected} == pytest.approx(expected)
    assert one(reward, answered("x", token_ids=[1] * 90)) == -0.5
    assert one(reward, answered("x")) is None, "a generator that tells no length"
    for margin in (0, 101):
        with pytest.raises(ValueError, match="margin_tokens is"):
            SoftOverlong(100, margin)


def test_language():
    english, chinese = "What colour is the cat?", "<image>图中的猫是什么颜色?"
    by_text(
        LanguageConsistency(), {"It is red.": 0, "红色的猫": -0.9, "red 红": -0.4, "": 0, "42": 0}, question=english
    )
    by_text(
        LanguageConsistency(),
        {"红色的猫": 0, "It is red.": -0.9, "用 Transformer 模型识别出来的结果": 0},
        question=chinese,
    )
    hidden = "<think>这只猫是红色的</think>It is red."
    assert one(LanguageConsistency(), answered(hidden, question=english)) < -0.3
    assert one(LanguageConsistency(part="final"), answered(hidden, question=english)) == 0.0
    code = "颜色是红色:\n```python\nprint('red red red')\n```\n$\\text{red}$ https://example.org/red/red"
    assert one(LanguageConsistency(), answered(code, question=chinese)) == 0.0
    assert one(LanguageConsistency(), answered("red", question="1 + 1 = ?")) is None
    assert one(LanguageConsistency(), answered("Это красный кот", question="Какого цвета кот?")) == 0.0
    shares = [one(LanguageConsistency(), answered("a " * k + "猫" * (20 - k), question=english)) for k in range(21)]
    assert shares == sorted(shares), "monotone"
    maths = "\\[ a b \\text{c} \\] \\(d \\frac{e}{f}\\) $$g$$ `h` <i>"
    assert not scripts(maths) and scripts(f"x {maths} y") == {"latin": 2}
    assert scripts("ab c 猫狗 日本 кот 7") == {"latin": 2, "cjk": 4, "other": 1}
    with pytest.raises(ValueError, match=r"min_share is 2"):
        LanguageConsistency(2)


def test_citations():
    sources = "Use [1] and [2], Reference 3 and https://a.org/x."
    good = [
        "as [1] says",
        "[1][2]",
        "see https://a.org/x.",
        "Reference 3 agrees",
        "image 1",
        "`x[9]` and $[9]$",
        "```\n[9]\n```",
        "x[9]",
        "",
    ]
    bad = ["as [3] says", "[1][4]", "https://b.org", "https://a.org/y", "Reference 4 agrees", "Image 2", "[^7]"]
    by_text(Citations(), dict.fromkeys(good, 0) | dict.fromkeys(bad, -1), question=sources)
    by_text(Citations(), {"[471, 10] or [7]": 0, "[7](https://b.org)": -1, "Image 2": -1}, question="Where?")


def test_confidence_is_rewarded_where_it_is_honest():
    reward = Calibration(Exact())
    said = {
        "7 <confidence>0.8</confidence>": 0.8,
        "<confidence>80%</confidence>": 0.8,
        "<confidence>1</confidence>": 1.0,
    }
    bad = [
        "7",
        "<confidence>2</confidence>",
        "<confidence>-1</confidence>",
        "<confidence>high</confidence>",
        "<confidence>nan</confidence>",
    ]
    assert {text: confidence(text) for text in said} == said and all(confidence(text) is None for text in bad)
    assert confidence("<confidence>0.1</confidence> no: <confidence>0.9</confidence>") == 0.9
    assert confidence("<think><confidence>0.9</confidence></think>7") is None
    right = [one(reward, answered(t, t)) for t in (f"7 <confidence>{c / 10}</confidence>" for c in range(11))]
    wrong = [one(reward, answered(t, "8")) for t in (f"7 <confidence>{c / 10}</confidence>" for c in range(11))]
    assert right == sorted(right) and right[-1] == 1.0 and wrong == sorted(wrong, reverse=True) and wrong[-1] == 0.0
    honest = max(range(11), key=lambda c: 0.7 * right[c] + 0.3 * wrong[c])
    assert honest == 7, "someone right in 7 of 10 cases does best by saying so"
    assert (
        reward([answered("7", "7"), answered("7", error="503")]) == [0.0, None] and reward.counts["no_confidence"] == 1
    )
    with pytest.raises(ValueError, match="accuracy: reward 'repetition' has range"):
        Calibration(Repetition())
