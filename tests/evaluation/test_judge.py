"""A judge decides what rules do not find right, and only that; without a verdict the rules stand."""

import pytest

from step3vl.evaluation import evaluate
from step3vl.evaluation.benchmarks import SimpleVQA
from step3vl.evaluation.judge import Judge, verdict
from step3vl.types import Completion, Sampling

from .answering import Says


class Clerk:
    """Finds an answer right when the gold stands in it; keeps what it was shown."""

    def __init__(self, silent=False):
        self.shown, self.silent = [], silent

    def generate(self, prompts, sampling, n=1):
        self.shown += [prompt.messages[-1].content for prompt in prompts]
        out = []
        for text in self.shown[-len(prompts) :]:
            gold, said = text.split("Correct answer:\n")[1].split("\n\nStudent's answer:\n")
            word = "CORRECT" if gold.lower() in said.split("\n\nSay one word")[0].lower() else "WRONG"
            out.append(
                [Completion(text="" if self.silent else f"<think>WRONG?</think>{word}.", token_ids=[], truncated=False)]
            )
        return out


def test_a_judge_is_asked_about_what_rules_do_not_accept(twins):
    clerk = Clerk()
    plain, judged = SimpleVQA(str(twins), 3), SimpleVQA(str(twins), 3, judge=Judge(clerk))
    golds = [case.answer for case in plain.cases()]
    texts = [golds[0], f"It looks like {golds[1]} to me", "something else"]
    sampling = Sampling(max_new_tokens=1)
    assert [r.score for r in evaluate("s", plain, Says(iter(texts)), sampling, blind=False)] == [1.0, 0.0, 0.0]
    assert [r.score for r in evaluate("s", judged, Says(iter(texts)), sampling, blind=False)] == [1.0, 1.0, 0.0]
    assert len(clerk.shown) == 2 and golds[1] in clerk.shown[0]
    silent = SimpleVQA(str(twins), 3, judge=Judge(Clerk(silent=True)))
    assert [r.score for r in evaluate("s", silent, Says(iter(texts)), sampling, blind=False)] == [1.0, 0.0, 0.0]
    assert silent.judge.num_undecided == 2


@pytest.mark.parametrize(
    "text, found",
    [
        ("CORRECT", True),
        ("wrong.", False),
        ("It is INCORRECT", False),
        ("<think>CORRECT</think> WRONG", False),
        ("", None),
    ],
)
def test_verdicts(text, found):
    assert verdict(text) is found


def test_a_judge_is_wired_by_configuration(tmp_path):
    from step3vl.evaluate import read_suite

    card = "{class_path: step3vl.generation.client.ChatClient, init_args: {url: 'http://localhost:1/v1', model: qwen}}"
    (tmp_path / "mine.yaml").write_text(
        "simplevqa:\n  class_path: step3vl.evaluation.benchmarks.SimpleVQA\n  init_args:\n"
        "    data_root: ${vars.data_root}\n    judge:\n      class_path: step3vl.evaluation.judge.Judge\n"
        f"      init_args: {{generator: {card}}}\n"
    )
    made = read_suite(str(tmp_path / "mine.yaml"), "data")["simplevqa"]
    assert made.judge.generator.model == "qwen" and str(made.data_root) == "data"
