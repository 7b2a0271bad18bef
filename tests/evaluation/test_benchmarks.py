"""Every benchmark from its file to its number, on twins: right answers score 1 however phrased, wrong ones 0."""

import json
from pathlib import Path

import numpy as np
import pytest

import step3vl.evaluation.benchmarks as benchmarks
from step3vl.evaluation import Case, evaluate, majority_score, summarise
from step3vl.evaluation.benchmarks.diagrams import called, calls_of
from step3vl.evaluation.benchmarks.hub import HubBenchmark
from step3vl.evaluation.benchmarks.pointing import corners, inside, overlap, rectangle
from step3vl.evaluation.benchmarks.programs import hidden_tests, same_output
from step3vl.evaluation.benchmarks.twins import TWINS
from step3vl.evaluation.sandbox import missing_isolation
from step3vl.types import Sampling
from tests.conftest import NUM_TWINS as NUM

from .answering import Says, records

NAMES = [kind.__name__ for kind in TWINS]
ISOLATED = not missing_isolation()


def benchmark(name, twins, **arguments) -> HubBenchmark:
    if "LiveCode" in name or "HumanEval" in name:
        if not ISOLATED:
            pytest.skip("programs are not run where they cannot be isolated")
        arguments |= {"wall_s": 5.0, "memory_mb": 512}
    return getattr(benchmarks, name)(str(twins), **arguments)


def right(case: Case) -> str:
    """What a perfect model says."""
    if case.answer_type != "program":
        return f"\\boxed{{{case.answer}}}" if case.answer_type == "math" else case.answer
    question, function = case.prompt.messages[-1].content, case.gold["function"]
    if function == "solution":
        value = case.gold["script"].partition("solution(1) == ")[2].split()[0]
        return f"```python\ndef solution(n):\n    return {value} * n\n```"
    sign = "*" if "a * b" in question else "+"
    if function is None:
        return f"```python\na, b = map(int, input().split())\nprint(a {sign} b)\n```"
    return f"Here it is.\n```python\nclass Solution:\n    def answer(self, a, b):\n        return a {sign} b\n```"


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_scores_one_and_a_silent_one_zero(name, twins):
    made = benchmark(name, twins)
    cases = made.cases()
    assert len(cases) >= NUM - 4 and len({case.id for case in cases}) == len(cases)
    thoughts = "<think>It may be A, or B, or 17.\n</think>\n"
    for texts, wanted in (([right(c) for c in cases], 1.0), ([thoughts + right(c) for c in cases], 1.0)):
        records = evaluate(name, made, Says(iter(texts)), Sampling(max_new_tokens=8), blind=False, cases_per_call=5)
        found = summarise(records, 0.0, made)
        assert found.headline == found.score == wanted and found.unreadable_rate == 0, [
            (record.answer, record.said) for record in records if record.score < 1
        ][:3]
    silent = evaluate(name, made, Says(iter([""] * len(cases))), Sampling(max_new_tokens=8), blind=False)
    assert summarise(silent, 0.0, made).headline == 0 and all(record.unreadable for record in silent)
    assert 0 <= majority_score(made, [case.without_images() for case in cases]) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_prompts_never_hold_the_gold_beyond_the_options(name, twins):
    for case in benchmark(name, twins).cases():
        assert case.prompt.messages[-1].role == "user" and case.prompt.messages[-1].content.strip()
        assert case.prompt.messages[-1].content.count("<image>") == len(case.prompt.images)
        if not case.gold.get("options") and case.answer_type in ("point", "box", "math") and case.group != "refusal":
            assert case.answer not in case.prompt.messages[-1].content


def test_all_benchmarks_of_the_report_are_in_its_suite():
    from step3vl.evaluate import read_suite

    report, ablations = (read_suite(name, "data") for name in ("report", "ablations"))
    assert len(report) == 18 and len(ablations) == 9
    assert {type(made) for made in [*report.values(), *ablations.values()]} == set(TWINS)
    with pytest.raises(ValueError, match=r"no benchmark 'mmmmu'; did you mean 'mmmu'|no benchmark 'mmmmu'.*mmmu"):
        read_suite("report", "data", "mmmmu")


# ------------------------------------------------------------------------------------------------ own means


def test_mmstar_counts_each_category_once_and_mmvp_pairs():
    star = benchmarks.MMStar("nowhere")
    assert star.headline(records("mmstar", [1, 1, 1, 0], ["a", "a", "a", "b"])) == 0.5
    pairs = benchmarks.MMVP("nowhere")
    found = records("mmvp", [1, 1, 1, 0], ["pair 0", "pair 0", "pair 1", "pair 1"])
    assert pairs.headline(found) == 0.5 and pairs.breakdown(found) == {"single": 0.75}


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize(
    "text, scale, score",
    [
        ("[0.30, 0.30]", "thousand", 1),
        ("[300, 300]", "thousand", 1),
        ("(300, 150)", "pixels", 1),
        ("[300, 300]", "pixels", 0),
        ("[0.9, 0.9]", "thousand", 0),
        ("no idea", "thousand", 0),
    ],
)
def test_points_on_three_scales(text, scale, score, twins):
    made = benchmarks.ScreenSpotV2(str(twins), coordinates=scale)
    case = made.cases(1)[0]
    case.gold = {"polygon": rectangle((0.2, 0.2, 0.4, 0.4)), "size": (1000, 500)}
    assert made.score(case, text) == score
    with pytest.raises(ValueError, match="coordinates is 'cm'; accepted are 'thousand' and 'pixels'"):
        benchmarks.ScreenSpotV2(str(twins), coordinates="cm")


def test_boxes_of_screenspot_in_three_forms():
    assert corners([0.1, 0.2, 0.3, 0.4], 100, 100) == (0.1, 0.2, 0.3, 0.4)
    assert corners([10, 20, 30, 40], 100, 100) == (0.1, 0.2, 0.3, 0.4)
    assert corners([50, 60, 20, 30], 100, 100) == (0.5, 0.6, 0.7, 0.9)


def test_inside_and_overlap_agree_with_counting_points():
    rng = np.random.default_rng(0)
    triangle = [(0.1, 0.1), (0.9, 0.2), (0.4, 0.8)]
    area = abs(0.8 * 0.7 - 0.3 * 0.1) / 2
    assert np.mean([inside(p, triangle) for p in rng.random((20_000, 2))]) == pytest.approx(area, abs=0.01)
    for a, b in (rng.random((2, 4)) for _ in range(20)):
        a, b = ((min(x[0], x[2]), min(x[1], x[3]), max(x[0], x[2]), max(x[1], x[3])) for x in (a, b))
        points = rng.random((4000, 2))
        in_a, in_b = (np.array([inside(p, rectangle(box)) for p in points]) for box in (a, b))
        union = (in_a | in_b).mean()
        if union > 0.05:
            assert overlap(a, b) == pytest.approx((in_a & in_b).mean() / union, abs=0.12)
    assert overlap((0, 0, 0, 0), (0, 0, 1, 1)) == 0 and overlap((1, 1, 0, 0), (0, 0, 1, 1)) == 0


# ------------------------------------------------------------------------------------------------ programs


def test_hidden_tests_are_read_without_running_them():
    import base64
    import os
    import pickle
    import zlib

    class Evil:
        def __reduce__(self):
            return (os.mkdir, ("owned",))

    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "1", "output": "2"}])))).decode()
    assert hidden_tests(packed) == [{"input": "1", "output": "2"}]
    with pytest.raises(ValueError, match=r"mkdir; they may hold text only"):
        hidden_tests(base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode())
    assert not Path("owned").exists()


def test_test_scripts_are_taken_apart():
    signature = 'from typing import List\n\ndef f(a: List[int], b=\'\'):\n    """What the diagram shows."""'
    script = "def test():\n    assert f([1, 2], 'a') == {'a': 3}\n    assert abs(f(({1}, -2)) - 0.5) < 1e-6\n"
    assert calls_of(script, signature) == ("f", [[[1, 2], "a"], [({1}, -2)]])
    assert called(script).endswith("\ntest()\n") and called(script + "test()").count("test()\n") == 1
    for bad in ("assert f(x) == 1", "assert f(a=1) == 1", "assert g(1) == 2", "x = 1"):
        with pytest.raises(ValueError):
            calls_of(bad, signature)
    with pytest.raises(ValueError, match="defines no function"):
        calls_of(script, "x = 1\nif x:")


@pytest.mark.skipif(not ISOLATED, reason="programs are not run where they cannot be isolated")
@pytest.mark.parametrize(
    "said, score",
    [
        ("```python\ndef solution(dots):\n    return len(set(dots)), 0.5\n```", 1),
        ("```python\ndef solution(dots):\n    return [len(set(dots)), 0.5]\n```", 0),
        ("```python\ndef solution(dots):\n    return len(dots), 0.5\n```", 0),
        ("```python\n    return len(set(dots)), 0.5\n```", 1),
        ("```python\ndef solution(dots: List[tuple]):\n    return len(set(dots)), 0.5\n```", 1),
        ("```python\ndef solution(dots):\n    return len(set(dots)), 0.5\n```\nTry:\n```python\nsolution([])\n```", 1),
        ("```python\nimport numpy as np\ndef solution(dots):\n    return np.int64(len(set(dots))), 0.5\n```", 1),
        ("```python\ndef solution(dots):\n    dots.clear()\n    return 2, 0.5\n```", 0),
        ("```python\ndef helper():\n    return 1\n```", 0),
    ],
)
def test_functions_get_tuples_and_give_them(said, score, twins):
    made = benchmark("HumanEvalV", twins)
    case = made.cases(1)[0]
    signature = 'from typing import List\n\ndef solution(dots: List[tuple]) -> tuple:\n    """Different dots."""'
    script = "def test():\n    assert solution([(1, 2), (1, 2), (3, 4)]) == (2, 0.5)\n"
    script += "    assert abs(solution([(0, 0)])[0] - 1.0) < 0.01\n"
    function, calls = calls_of(script, signature)
    case.gold = {"function": function, "calls": calls, "signature": signature, "script": called(script)}
    assert made.score(case, said) == score


@pytest.mark.parametrize(
    "said, gold, same",
    [
        ("1 2\n3 \n", "1 2\n3", 1),
        ("1.0", "1", 1),
        ("1\n2", "1 2", 0),
        ("", "1", 0),
        ("yes", "Yes", 0),
        ("nan", "nan", 1),
        ("100000000000000001", "100000000000000000", 0),
        ("2.50 1e3", "2.5 1000", 1),
    ],
)
def test_outputs_are_compared_line_by_line(said, gold, same):
    assert same_output(said, gold) == bool(same)


@pytest.mark.skipif(not ISOLATED, reason="programs are not run where they cannot be isolated")
@pytest.mark.parametrize(
    "code, score",
    [
        ("class Solution:\n    def answer(self, a, b):\n        return a * b", 1),
        ("def answer(a, b):\n    return a * b", 1),
        ("class Solution:\n    def answer(self, a, b):\n        return reduce(mul, deepcopy([a, b]))", 1),
        ("import numpy as np\ndef answer(a, b):\n    return np.prod([a, b])", 1),
        ("def answer(a, b):\n    return (a * b,)", 0),
        ("def answer(a, b):\n    return str(a * b)", 0),
        ("def other(a, b):\n    return a * b", 0),
    ],
)
def test_methods_and_functions_of_livecodebench(code, score, twins):
    made = benchmark("LiveCodeBench", twins)
    case = next(c for c in made.cases() if c.gold["function"] and "a * b" in c.prompt.messages[-1].content)
    assert made.score(case, f"```python\n{code}\n```") == score


@pytest.mark.skipif(not ISOLATED, reason="programs are not run where they cannot be isolated")
def test_programs_that_lie_do_not_pass(twins):
    made = benchmark("HumanEvalV", twins)
    case = made.cases(1)[0]
    lies = [
        "def solution(n):\n    import os\n    os._exit(0)",
        "class All(int):\n    def __eq__(self, other):\n        return True\ndef solution(n):\n    return All(-1)",
        "def solution(n):\n    print('all tests passed')",
        "import sys\nsys.exit(0)",
    ]
    assert [made.score(case, f"```python\n{lie}\n```") for lie in lies] == [0.0] * len(lies)


# ------------------------------------------------------------------------------------------------ data


def test_what_is_missing_is_named(tmp_path, twins):
    with pytest.raises(ValueError, match=r"MMStar: there is no .*Lin-Chen/MMStar and no .*MMStar; copy the dataset"):
        benchmarks.MMStar(str(tmp_path)).cases()
    (tmp_path / "MMStar").mkdir()
    with pytest.raises(ValueError, match=r"has no file for split 'val' of MMStar"):
        benchmarks.MMStar(str(tmp_path)).cases()
    (tmp_path / "MMStar/val.jsonl").write_text('{"index": 1}\n')
    with pytest.raises(ValueError, match=r"val.jsonl, row 0: column 'image' is missing; MMStar reads index, image"):
        benchmarks.MMStar(str(tmp_path)).cases()
    row = {"index": 1, "image": "../../etc/passwd", "question": "?", "answer": "A", "category": "", "l2_category": ""}
    (tmp_path / "MMStar/val.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"row 0: not a case of MMStar \(image is neither a file"):
        benchmarks.MMStar(str(tmp_path)).cases()
    (tmp_path / "MMStar/val.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "MMStar/val.jsonl").unlink()
    with pytest.raises(ValueError, match=r"val.parquet cannot be read as parquet"):
        benchmarks.MMStar(str(tmp_path)).cases()


def test_a_limit_reads_no_further(twins):
    assert len(benchmarks.MMStar(str(twins)).cases(3)) == 3
    assert len(benchmarks.MMStar(str(twins), num_cases=2).cases(3)) == 2
    window = benchmarks.LiveCodeBench(str(twins), first_date="2025-02-01", last_date="2025-03-31")
    if ISOLATED:
        assert 0 < len(window.cases()) < NUM


def test_a_program_may_import_from_the_future(twins):
    """Such imports must come first, also before what solutions may use unimported."""
    made = benchmark("HumanEvalV", twins)
    case = made.cases(1)[0]
    code = right(case).replace("def solution", "from __future__ import annotations\ndef solution")
    assert made.score(case, code) == 1.0


@pytest.mark.skipif(not ISOLATED, reason="programs are not run where they cannot be isolated")
def test_livecodebench_reads_the_files_of_all_releases(tmp_path):
    folder = tmp_path / "code_generation_lite"
    folder.mkdir()
    tests = json.dumps([{"input": "1\n", "output": "1\n", "testtype": "stdin"}])
    for number, name in enumerate(("test.jsonl", "test2.jsonl", "test10.jsonl", "tests_of_mine.jsonl")):
        row = {"question_id": str(number), "question_content": "?", "starter_code": "", "public_test_cases": tests}
        row |= {"private_test_cases": "[]", "metadata": "{}", "contest_date": f"2025-0{number + 1}-01T00:00:00"}
        (folder / name).write_text(json.dumps(row) + "\n")
    assert [case.id for case in benchmarks.LiveCodeBench(str(tmp_path)).cases()] == ["0", "1", "2"]
    assert [case.id for case in benchmarks.LiveCodeBench(str(tmp_path), first_date="2025-02-15").cases()] == ["2"]
