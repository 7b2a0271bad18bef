"""Ten thousand mangled answers, and monsters, through every reward: none crashes, none is slow, all are in bounds."""

import json
import math
import time
from pathlib import Path

import pytest

from step3vl import rewards
from step3vl.types import Region
from tests.evaluation.test_extract import MONSTERS, mangled

from .answers import Judge, answered, verdict

HOSTILE = Path(__file__).parents[1] / "evaluation" / "hostile_answers.json"
LIMIT_S = 2.0
"""Ten times what is promised on an idle machine; what backtracks or is quadratic needs far more."""
LONGEST = 100_000
"""Characters: twice what is searched of an answer."""
BOX = [Region(label="answer", box=(100, 100, 300, 300))]
MANY = [Region(label="counted", box=(k, k, k + 30, k + 30)) for k in range(0, 900, 60)]
judge = Judge(lambda text: "FINAL: NO" if "STUDENT" in text else verdict(2))
REWARDS = [
    (rewards.BoxOverlap(), {"regions": BOX}),
    (rewards.BoxOverlap("iou_squared", "unit"), {"regions": BOX}),
    (rewards.BoxOverlap("giou", "pixels"), {"regions": BOX}),
    (rewards.GaussianPoint(), {"regions": BOX}),
    (rewards.EuclideanPoint(), {"regions": BOX}),
    (rewards.EuclideanPoint(decay="linear", coordinates="unit"), {"regions": BOX}),
    (rewards.Click(), {"regions": BOX}),
    (rewards.PointMatching(exact_count_share=0.5), {"regions": MANY}),
    (rewards.BoxMatching("giou"), {"regions": MANY}),
    (rewards.Choice(), {"answer": "B"}),
    (rewards.Choice(), {"answer": "B", "gold": {"options": ["a", "b"]}}),
    (rewards.Number(relative=0.1), {"answer": "7"}),
    (rewards.Expression(), {"answer": "x + 1"}),
    (rewards.Exact(), {"answer": "471"}),
    (rewards.Contains(), {"answer": "cat"}),
    (rewards.EditSimilarity(), {"answer": "The cat sat on the mat. " * 5}),
    (rewards.ThinkOnce(), {}),
    (rewards.BoxedOnce(), {}),
    (rewards.Pattern(r"answer:? \d+"), {}),
    (rewards.Repetition(), {}),
    (rewards.SoftOverlong(100, 50), {}),
    (rewards.LanguageConsistency(), {}),
    (rewards.Citations(), {}),
    (rewards.Calibration(rewards.Exact()), {"answer": "471"}),
    (rewards.Verifier(judge, 10), {"answer": "471"}),
    (rewards.GenRM(judge, 10, pairs="reference"), {"answer": "471"}),
]
IDS = [f"{reward.name}-{k}" for k, (reward, _) in enumerate(REWARDS)]


def rollouts(texts, more):
    first = answered("", **more)
    for text in texts:
        ids = [ord(letter) % 64 for letter in text[:200]]
        completion = type(first.completion)(text=text, token_ids=ids, truncated=False, num_tokens=len(text))
        yield rewards.Answered(prompt=first.prompt, completion=completion, case=first.case)


def judged(reward, more, texts):
    """Values, after each was in bounds and in time."""
    values = []
    low, high = reward.bounds
    reward(list(rollouts(["[1, 2] [1, 2, 3, 4]"], more)))  # what is imported at the first call is
    for rollout in rollouts(texts, more):
        start = time.thread_time()
        (value,) = reward([rollout])
        seconds = time.thread_time() - start
        assert seconds < LIMIT_S, (seconds, reward.name, rollout.text[:60], len(rollout.text))
        assert value is None or (math.isfinite(value) and low <= value <= high), (value, rollout.text[:60])
        values.append(value)
    return values


@pytest.fixture(scope="module")
def texts():
    texts = list(mangled(10_000, seed=12))
    assert len({*texts}) > 9_900
    return texts


@pytest.mark.parametrize(("reward", "more"), REWARDS, ids=IDS)
def test_mangled_answers(reward, more, texts):
    judged(reward, more, texts)


def monsters():
    rows = json.loads(HOSTILE.read_text())
    hostile = [row["text"] if "text" in row else row["before"] * row["times"] + row["after"] for row in rows]
    repeated = [piece * (LONGEST // len(piece)) for piece in MONSTERS]
    own = [
        "[1] ",
        "https://a.b/",
        "<confidence>",
        "image 1 ",
        "```",
        "`a",
        "$",
        "$$",
        "\\(",
        "\\[",
        "猫",
        "ка ",
        "http",
        "[1][1]",
    ]
    return hostile + repeated + [piece * (LONGEST // len(piece)) for piece in own]


@pytest.mark.parametrize(("reward", "more"), {type(row[0]): row for row in REWARDS}.values())
def test_monsters(reward, more):
    judged(reward, more, monsters())


def test_every_reward_is_here():
    made = {getattr(rewards, name) for name in rewards.__all__ if hasattr(getattr(rewards, name), "bounds")}
    assert (
        made - {type(reward) for reward, _ in REWARDS}
        == {rewards.EachAnswer, rewards.Reward, rewards.MathVerify} & made
    )


def test_mathematics_ends_in_time_too():
    """Hostile answers cost math-verify's own time limit at most; tests/evaluation shows it answer by answer."""
    pytest.importorskip("math_verify", reason="math-verify is optional: pip install 'step3vl[rl]'")
    reward = rewards.MathVerify(num_workers=2, timeout_s=0.2)
    try:
        texts = [*monsters()[:6], *mangled(100, seed=13)]
        values = reward(list(rollouts(texts, {"answer": "\\frac{1}{2}"})))
        assert len(values) == len(texts) and {*values} <= {0.0, 1.0} and reward.counts["timeouts"] >= 1
    finally:
        reward.close()


@pytest.mark.parametrize(("reward", "more"), REWARDS, ids=IDS)
def test_an_answer_that_never_came_is_not_judged(reward, more):
    assert reward([answered("", error="503", num_tokens=0, **more)]) == [None] and reward([]) == []
