"""Measures on generators whose right answers are known, so that every number can be worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from step3vl.evaluation import Benchmark, Case
from step3vl.evaluation.answers import prompt_hash
from step3vl.pacore import PaCoReGenerator
from step3vl.pacore.agreement import agreement, claim
from step3vl.pacore.measures import coordination, cross_checks, find_cases
from step3vl.pacore.plot import plot_scaling
from step3vl.pacore.scaling import scaling
from step3vl.types import Message, Prompt, Sampling
from tests.pacore.answering import Notes, asked

SAMPLING = Sampling(max_new_tokens=20, temperature=1.0, seed=3)
ROLLOUTS = {
    "q0": "1111",  # all right
    "q1": "0001",  # one right
    "q2": "0000",  # none right, and synthesis finds it
    "q3": "2220",  # none right, and synthesis does not
    "q4": "1101",
}
FINALS = {"q0": 1, "q1": 1, "q2": 1, "q3": 0, "q4": 0}


class Ones(Benchmark):
    """Questions q0 to q4; 1 is right."""

    def cases(self, limit=None):
        return [Case(id=name, prompt=asked(name), answer="1", answer_type="number") for name in list(ROLLOUTS)[:limit]]


def say(prompt, sampling, k):
    text = prompt.messages[-1].content
    if text in ROLLOUTS:
        return f"<think>hm</think>{ROLLOUTS[text][k % 4]}"
    name = text.split("Original Problem:\n")[1][:2]
    return f"<think>Reference 1, ref 2</think>{FINALS[name]}"


def test_words_that_check_others_are_counted():
    assert cross_checks("Reference 1 and the references; 参考, Ref 3, ref. 4, ref5") == 6
    assert cross_checks("I refer to a refund, prefer refs") == 0


def test_a_trace_tells_what_was_shown_and_what_came_of_it(tmp_path):
    file = tmp_path / "t.jsonl"
    cases = Ones().cases()
    pacore = PaCoReGenerator(Notes(say), [4], trace=file)
    pacore.generate([asked("q0")], SAMPLING)  # an earlier run of the same question
    pacore.generate([case.prompt for case in cases], SAMPLING)
    file.write_text(file.read_text() + '{"torn')
    known = {prompt_hash(case.prompt): case.without_images() for case in cases}
    found = coordination(find_cases(file, known), Ones())
    assert found.num_questions == 5 and found.final == pytest.approx(3 / 5)
    assert found.messages == pytest.approx((4 + 1 + 0 + 0 + 3) / 20) and found.covered == pytest.approx(3 / 5)
    assert (found.num_all_wrong, found.emergent) == (2, 0.5) and (found.num_all_right, found.kept) == (1, 1.0)
    assert found.cross_checks == 2 and found.num_final_tokens == 4 and found.num_tokens == 4 * 1 + 4
    assert found.num_prompt_tokens and not found.counted_exactly


def test_failures_are_counted_and_kept_out_of_scores(tmp_path):
    def fails(prompt, sampling, k):
        text = prompt.messages[-1].content
        if (text, k) == ("q0", 1) or "Problem:\nq1" in text:
            return TimeoutError("late")
        return say(prompt, sampling, k)

    file = tmp_path / "t.jsonl"
    cases = Ones().cases(2)
    PaCoReGenerator(Notes(fails), [4], trace=file).generate([case.prompt for case in cases], SAMPLING)
    found = coordination(find_cases(file, {prompt_hash(case.prompt): case for case in cases}), Ones())
    assert (found.num_failed, found.num_without_final, found.num_questions) == (2, 1, 2)
    assert found.final == 1.0 and found.messages == 1.0 and found.num_all_right == 1


def test_nothing_measured_is_nothing():
    assert coordination(iter([]), Ones()).num_questions == 0


def test_places_are_scored_without_pixels(small_corpus):
    """Traces are scored after the images are gone."""
    from step3vl.evaluation import HeldOut

    made = HeldOut(f"{small_corpus}/test/grounding-point-level0-*.tar", 3)
    cases = made.cases()
    gold = [next(region for region in case.regions if region.label == "answer").box for case in cases]
    said = []
    for case, (x0, y0, x1, y1) in zip(cases, gold):
        width, height = case.prompt.images[0].size
        said.append(f"({500 * (x0 + x1) / width:.1f}, {500 * (y0 + y1) / height:.1f})")
    assert [made.score(case.without_images(), text) for case, text in zip(cases, said)] == [1.0] * 3


# ------------------------------------------------------------------------------------------------ the curve


def test_the_curve_has_the_numbers_that_were_put_in(tmp_path):
    notes = Notes(say)
    curve = scaling("ones", Ones(), notes, SAMPLING, [4, 1, 2], cases_per_call=2, trace=tmp_path / "t.jsonl")
    asks = [(len(prompts), n) for prompts, _, n in notes.calls]
    assert asks[:4] == [(2, 4), (2, 1), (2, 1), (2, 1)] and len(asks) == 12, "rollouts are asked once"
    assert [sampling.seed for _, sampling, n in notes.calls if n == 4] == [3, 4, 5]
    one, two, four = curve.points
    assert [p.num_rollouts for p in curve.points] == [1, 2, 4] and curve.num_cases == 5
    assert (one.mean, one.voted, one.covered) == (0.4, 0.4, 0.4)
    assert (four.mean, four.voted, four.covered) == (0.4, 0.4, 0.6)
    assert two.mean == 0.4 and four.pacore == pytest.approx(0.6) and four.emergent == 0.5
    assert four.pacore_low <= 0.6 <= four.pacore_high and four.pacore_less_voted == pytest.approx(0.2)
    assert four.num_rollout_tokens == 4 and four.num_tokens == 8 and one.num_tokens == 5 and four.cross_checks == 2
    assert 0.5 < four.p_value <= 1, "three cases differ, two of them one way"
    png = plot_scaling(tmp_path / "out" / "curve.png", curve, "a model")
    picture = np.asarray(Image.open(png).convert("RGB"))
    assert picture.shape[1] > 1000 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_foreign_messages_are_another_cases_and_judged_by_the_own_answer():
    """Five cases in calls of two: the first sees the second's, every other the one's before it."""
    copier = Notes(lambda prompt, sampling, k: prompt.messages[-1].content.split("\n")[-1])
    names = [str(number) for number in range(5)]

    class Echo(Ones):
        def stream(self, limit=None):
            for name in names:
                asked = Prompt(messages=[Message(role="user", content=name)])
                yield Case(id=name, prompt=asked, answer=name, answer_type="exact")

        def scores(self, pairs):
            return [float(case.answer == text) for case, text in pairs]

    settings = {"cases_per_call": 2, "template": "short"}
    for foreign, right in ((False, 1.0), (True, 0.0)):
        (point,) = scaling("echo", Echo(), copier, SAMPLING, [3], foreign=foreign, **settings).points
        assert (point.mean, point.pacore) == (1.0, right)
    shown = [prompt.messages[-1].content for prompts, _, n in copier.calls if n == 1 for prompt in prompts][5:]
    assert [text.split("\n")[-1] for text in shown] == ["1", "0", "1", "2", "3"]
    with pytest.raises(ValueError, match="no other case has messages"):
        scaling("echo", Echo(), copier, SAMPLING, [3], limit=1, foreign=True, cases_per_call=1)


def test_a_curve_needs_widths_and_cases():
    with pytest.raises(ValueError, match=r"widths is \[0\]"):
        scaling("ones", Ones(), Notes(say), SAMPLING, [0])
    with pytest.raises(ValueError, match="no case"):
        scaling("ones", Ones(), Notes(say), SAMPLING, [1], limit=0)


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize(
    "text, found",
    [
        ("<think>x</think>The area is \\boxed{12}.", "12"),
        ("So the answer is (B).", "b"),
        ("First this.\n\n**A red Cube.**", "a red cube"),
        ("", ""),
        ("<think>never closed", "<think>never closed"),
    ],
)
def test_what_an_answer_comes_to(text, found):
    assert claim(text) == found


def test_the_commonest_claim_is_counted():
    assert agreement(["\\boxed{3}", "4", "it is \\boxed{ 3 }", "4"]) == ("3", 2)
    assert agreement([]) == ("", 0)
    assert len(agreement(["x" * 500])[0]) == 60
