"""Adding rewards up; the cards; and every reward, broken on purpose, is noticed."""

import pytest
from jsonargparse import ArgumentParser

from step3vl import rewards
from step3vl.config import CONFIGS, compose
from step3vl.rewards import (
    Choice,
    EachAnswer,
    Exact,
    Number,
    Repetition,
    Rubric,
    SoftOverlong,
    Verifier,
    Weighted,
    summarise,
)
from step3vl.rewards.base import checked

from .answers import Judge, answered


def rubric(truncated="zero", **more):
    return Rubric(
        {
            "number": {"number": Weighted(reward=Number()), "form": Weighted(reward=Exact(), weight=0.5)},
            "letter": {"letter": Weighted(reward=Choice())},
        },
        {"repetition": Weighted(reward=Repetition(), weight=0.2, required=False)},
        truncated=truncated,
        **more,
    )


def test_totals_and_breakdown():
    rollouts = [
        answered("7", "7", "number", token_ids=[1, 2, 3]),
        answered("it is 7", "7", "number", token_ids=[1] * 12),
        answered("B", "B", "letter"),
        answered("A", "B", "letter", token_ids=[5]),
    ]
    scores = rubric()(rollouts)
    assert [s.total for s in scores] == pytest.approx([1.5, 1 - 0.2 * 0.9, 1, 0])
    assert scores[1].parts == {"number": 1.0, "form": 0.0, "repetition": pytest.approx(-0.9)}
    assert scores[2].parts == {"letter": 1.0, "repetition": None}, "an optional one that cannot judge is left out"
    assert [s.outcome for s in scores] == ["scored"] * 4
    log = summarise(scores)
    assert log["mean/number"] == 1.0 and log["mean/letter"] == 0.5 and log["unjudged/repetition"] == 1.0
    assert log["total"] == pytest.approx(sum(s.total for s in scores) / 4) and log["share/scored"] == 1.0
    assert rubric()(rollouts[::-1])[::-1] == scores and rubric()([]) == [] and summarise([]) == {}


def test_a_required_reward_that_cannot_judge_leaves_no_total():
    judge = Judge(lambda text: None)
    lines = {"verified": Weighted(reward=Verifier(judge, 10)), "exact": Weighted(reward=Exact())}
    scores = Rubric({"exact": lines})([answered("x", "y"), answered("y", "y")])
    assert [(s.total, s.outcome) for s in scores] == [(None, "unjudged"), (2.0, "scored")]
    lines["verified"].required = False
    assert [s.total for s in Rubric({"exact": lines})([answered("x", "y")])] == [0.0]
    log = summarise(scores)
    assert log["unjudged/verified"] == 1.0 and log["share/unjudged"] == 0.5 and log["total"] == 2.0
    assert Rubric({"exact": lines}).counts()["exact/verified/outages"] == 2


@pytest.mark.parametrize(("policy", "total"), [("zero", 0.0), ("drop", None), ("score", 1.5)])
def test_truncated_answers(policy, total):
    asked = []

    class Watched(Number):
        def score(self, rollout):
            asked.append(rollout)
            return super().score(rollout)

    made = rubric(policy)
    made.answers["number"]["number"].reward = Watched()
    (score,) = made([answered("7", "7", "number", truncated=True)])
    assert score.total == total and bool(asked) == (policy == "score")
    assert score.outcome == ("scored" if policy == "score" else "truncated")


def test_an_answer_that_never_came_is_neither_right_nor_wrong():
    scores = rubric("score")([answered("", "7", "number", error="503", truncated=True), answered("7", "7", "number")])
    assert [(s.total, s.outcome) for s in scores] == [(None, "error"), (1.5, "scored")]


def test_each_reward_is_asked_once_a_batch():
    judge = Judge(lambda text: "FINAL: NO")
    calls = []
    judge.generate = lambda prompts, *rest, inner=judge.generate: calls.append(len(prompts)) or inner(prompts, *rest)
    made = Rubric({"otherwise": {"verified": Weighted(reward=Verifier(judge, 10))}})
    made([answered(f"a{k}", "y", kind) for k, kind in enumerate(["exact", "number", "exact"])])
    assert calls == [3]


def test_refusals():
    with pytest.raises(ValueError, match="c: answer_type 'box' is not in the rubric; accepted: number, letter"):
        rubric()([answered("x", "y", "box")])
    with pytest.raises(ValueError, match="truncated is 'keep'"):
        rubric("keep")
    with pytest.raises(ValueError, match="answers is empty"):
        Rubric({})
    with pytest.raises(ValueError, match=r"answers\.exact lists no reward"):
        Rubric({"exact": {}})
    with pytest.raises(ValueError, match="share the name 'a'"):
        Rubric({"exact": {"a": Weighted(reward=Exact())}}, {"a": Weighted(reward=Repetition())})


@pytest.mark.parametrize("broken", [1.5, -0.1, float("nan"), float("inf")])
def test_a_reward_outside_its_bounds_is_refused(broken):
    class Broken(Exact):
        def score(self, rollout):
            return broken

    with pytest.raises(ValueError, match="c: reward 'exact' gave"):
        Rubric({"exact": {"exact": Weighted(reward=Broken())}})([answered("x", "y")])

    class Short(Exact):
        def __call__(self, rollouts):
            return super().__call__(rollouts)[1:]

    with pytest.raises(ValueError, match="returned 1 values for 2 answers"):
        checked(Short(), [answered("x", "y")] * 2)


# ------------------------------------------------------------------------------------------------ cards


def parsed(card, scale, folder, *more):
    (folder / "run.yaml").write_text(f"rubric: {card}\n")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rubric", type=Rubric)
    return parser.instantiate(parser.parse_object(compose([folder / "run.yaml"], more, scale=scale).config)).rubric


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("card", ["rubric/rlvr.yaml", "rubric/rlhf.yaml"])
def test_cards_become_rubrics(card, scale, tmp_path):
    made = parsed(card, scale, tmp_path, "rubric.penalties.overlong.weight=0.25")
    assert made.penalties["overlong"].weight == 0.25 and not made.penalties["overlong"].required
    assert isinstance(made.penalties["overlong"].reward, SoftOverlong)
    kinds = {"exact", "letter", "contains", "number", "math", "point", "box"}
    assert "otherwise" in made.answers or kinds <= made.answers.keys(), "every type of the corpus has its reward"


def test_another_class_is_refused(tmp_path):
    wrong = "rubric.answers.otherwise.preference.reward=step3vl.evaluation.judge.Judge"
    with pytest.raises(Exception, match=r"protocol|subclass"):
        parsed("rubric/rlhf.yaml", "tiny", tmp_path, wrong)


def test_numbers_of_the_cards_have_a_source():
    for card in ("rlvr", "rlhf"):
        for line in (CONFIGS / "rubric" / f"{card}.yaml").read_text().splitlines():
            value = line.split("#")[0].rstrip()
            if (value[-1:].isdigit() and "url" not in value) or "{n: 3}" in value:
                assert "# report" in line or "# not given in the report; " in line, line


def test_tiny_cards_score_answers_of_the_corpus(tmp_path, small_corpus):
    from step3vl.data.shards import ShardReader, find_shards
    from step3vl.evaluation import Case
    from step3vl.rewards import Answered
    from step3vl.types import Completion

    made = parsed("rubric/rlvr.yaml", "tiny", tmp_path)
    kinds = set()
    for path in find_shards(str(small_corpus / "test" / "*.tar")):
        reader = ShardReader(path)
        samples = [reader.read(k) for k in range(min(3, len(reader)))]
        cases = [Case.from_sample(sample) for sample in samples if sample.answer_type]
        for text_of, best in ((lambda s: s.messages[-1].content, True), (lambda s: "no idea at all", False)):
            texts = [text_of(sample) for sample in samples if sample.answer_type]
            completions = [Completion(text=text, token_ids=[1, 2, 3], truncated=False) for text in texts]
            scores = made([Answered(prompt=c.prompt, completion=done, case=c) for c, done in zip(cases, completions)])
            for case, score in zip(cases, scores):
                kinds.add(case.answer_type)
                assert (score.total > 0.9) if best else score.total < 0.5, (case.id, case.answer, score)
    assert len(kinds) >= 3, kinds


# ------------------------------------------------------------------------------------------------ every reward


def test_rewards_have_distinct_names_and_bounds():
    found = [getattr(rewards, name) for name in rewards.__all__]
    made = [
        cls
        for cls in found
        if isinstance(cls, type) and hasattr(cls, "bounds") and cls not in (EachAnswer, rewards.Reward)
    ]
    assert len(made) >= 20 and len({cls.name for cls in made}) == len(made)
    assert all(cls.name and cls.bounds in ((0.0, 1.0), (-1.0, 0.0)) and cls.__doc__ for cls in made)
