"""Our scorers beside other people's on the same phrasings: equal, or different for a reason that is written.

phrasings/references.json names harness, version and function of each table. Verdicts of lmms-eval and VLMEvalKit are
asked again where they are installed; those of MathArena, LiveCodeBench, HumanEval-V and ReMI's notebook, which are no
packages, were written down when their functions were run.
"""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from step3vl.evaluation import Case, benchmarks
from step3vl.evaluation.benchmarks.diagrams import called, calls_of
from step3vl.evaluation.sandbox import missing_isolation
from step3vl.types import Message, Prompt

TABLES = json.loads((Path(__file__).parent / "phrasings/references.json").read_text())
KINDS = {
    "mathvista": benchmarks.MathVista,
    "mathvision": benchmarks.MathVision,
    "hmmt2025": benchmarks.HMMT2025,
    "phyx": benchmarks.PhyX,
    "ai2d": benchmarks.AI2D,
    "mmbench": benchmarks.MMBench,
    "all_angles": benchmarks.AllAngles,
    "remi": benchmarks.ReMI,
    "livecodebench": benchmarks.LiveCodeBench,
    "humaneval_v": benchmarks.HumanEvalV,
}
PROGRAMS = ("livecodebench", "humaneval_v")
OPTIONS = ["first one", "second one", "third one", "fourth one"]  # the second is right
COLOURS = ["red", "green", "blue", "none"]
PRECISION = {"float1": 1, "float2": 2}
ANSWER_TYPES = {"choice": "text", "float1": "float", "float2": "float"}
PRINTED = [("3 4\n", "7\n"), ("10 -2\n", "8\n")]
RETURNED = [([1, 2], [1, 2]), ([5, 6], [5, 6])]
SIGNATURE = (
    'def solution(dots: list, size: int) -> tuple:\n    """\n    Different dots, times the size, and a half.\n    """'
)
SCRIPT = (
    "def test():\n    assert solution([(1, 2), (1, 2), (3, 4)], 2) == (4, 0.5)\n"
    "    assert solution([], 3) == (0, 0.5)\n\ntest()\n"
)


def case(name: str, row: dict) -> Case:
    answer, kind, group, gold = row.get("gold", "B"), "other", "", {}
    match name:
        case "mathvista" if row["kind"] == "choice":
            answer, kind, gold = "B", "letter", {"options": COLOURS}
        case "mathvista":
            group = ANSWER_TYPES.get(row["kind"], row["kind"])
            kind, gold = "number", {"options": [], "precision": PRECISION.get(row["kind"], 0)}
        case "mathvision":
            gold = {"options": row["options"]}
        case "remi":
            group = row["task"]
        case "livecodebench":
            gold = {"function": None, "tests": PRINTED} if row["kind"] == "stdin" else {}
            gold = gold or {"function": "pairs", "tests": RETURNED}
        case "humaneval_v":
            function, calls = calls_of(SCRIPT, SIGNATURE)
            gold = {"function": function, "calls": calls, "signature": SIGNATURE, "script": called(SCRIPT)}
        case "phyx" | "ai2d" | "mmbench" | "all_angles":
            gold = {"options": OPTIONS[:3] if name == "all_angles" else OPTIONS}
    prompt = Prompt(messages=[Message(role="user", content="?")])
    return Case(id="0", prompt=prompt, answer=answer, answer_type=kind, group=group, gold=gold)


@pytest.mark.parametrize("name", KINDS)
def test_ours_are_as_recorded_and_differences_have_reasons(name):
    if name in PROGRAMS and missing_isolation():
        pytest.skip("programs are not run where they cannot be isolated")
    if name in ("mathvision", "hmmt2025"):
        pytest.importorskip("math_verify", reason="mathematics is compared by math-verify")
    if name in PROGRAMS:
        pytest.importorskip("numpy", reason="some of the programs import numpy")
    table = TABLES[name]
    assert table["harness"] and table["function"] and table["note"]
    rows = table["rows"]
    made = KINDS[name]("nowhere", **({"wall_s": 3.0, "memory_mb": 512} if name in PROGRAMS else {}))
    assert len(rows) >= 40
    found = made.scores([(case(name, row), row["said"]) for row in rows])
    assert [(row["said"], row["ours"]) for row in rows] == [(row["said"], score) for row, score in zip(rows, found)]
    for row in rows:
        assert (row["ours"] == row["theirs"]) != ("why" in row), row


LMMS = ("mathvista", "mathvision", "phyx", "ai2d", "mmbench")
NEEDED = {"mathvista": "Levenshtein", "mathvision": "latex2sympy2", "phyx": "openai", "mmbench": "pandas"}


@pytest.mark.parametrize("name", LMMS)
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_lmms_evals_are_as_recorded(name, monkeypatch):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason=f"lmms-eval's {name} needs {NEEDED[name]}")
    for key in ("OPENAI_API_KEY", "Deepseek_API"):  # asked for when the tasks are imported
        monkeypatch.setenv(key, "none")
    for row in TABLES[name]["rows"]:
        assert theirs(name, row) == row["theirs"], row


@pytest.mark.skipif(find_spec("vlmeval") is None, reason="VLMEvalKit is not installed")
def test_vlmevalkits_are_as_recorded():
    from vlmeval.dataset.utils.multiple_choice import extract_answer_from_item

    for row in TABLES["all_angles"]["rows"]:
        item = {"question": "?", "prediction": row["said"], **dict(zip("ABC", OPTIONS)), "answer": "B"}
        assert float(extract_answer_from_item(None, item)["opt"] == "B") == row["theirs"], row


def theirs(name: str, row: dict) -> float:
    said = row["said"].strip()
    match name:
        case "mathvista":
            judge = mathvista_judge()
            is_choice = row["kind"] == "choice"
            problem = {
                "question_type": "multi_choice" if is_choice else "free_form",
                "answer_type": ANSWER_TYPES.get(row["kind"], row["kind"]),
                "choices": COLOURS if is_choice else None,
                "query": "?",
            }
            read = judge.extract_answer(said, problem, quick_extract=True)
            precision = PRECISION.get(row["kind"], 0)
            kinds = problem["choices"], problem["question_type"], problem["answer_type"], precision
            return float(judge.safe_equal(judge.normalize_extracted_answer(read, *kinds), row["gold"]))
        case "mathvision":
            from lmms_eval.tasks.mathvision.utils import mathvision_process_results as score

            doc = {"answer": row["gold"], "options": row["options"]}
            return float(score(doc, [row["said"]])["mathvision_standard_eval"]["scores"][0])
        case "phyx":
            return float(phyx_judge().PhyX_auxeval_MC({"index": 0, "answer": "B", "prediction": said})["res"])
        case "ai2d":
            from lmms_eval.api.metrics import exact_match_hf_evaluate
            from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter

            marks = {"ignore_case": True, "ignore_punctuation": True}
            read = MultiChoiceRegexFilter(regex_pattern="([A-Z])\\.", **marks).apply([[row["said"]]], [{}])
            return float(exact_match_hf_evaluate(predictions=read, references=["B"], **marks)["exact_match"])
    import pandas
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    doc = {"index": 0, "question": "?", "answer": "B", "prediction": said, **dict(zip("ABCD", OPTIONS))}
    return float(MMBench_Evaluator().eval_sub_data(pandas.DataFrame([doc]), {0: "B"}, static_only=True))


@cache
def mathvista_judge():
    """lmms-eval's evaluator, whose language model says nothing."""
    from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator

    made = MathVistaEvaluator()
    made.get_chat_response = lambda *args, **kwargs: ""
    return made


@cache
def phyx_judge():
    """lmms-eval's evaluator, whose language model cannot be reached."""
    from lmms_eval.tasks.phyx.phyx_evals import FAIL_MSG, PhyXEvaluator

    made = PhyXEvaluator()
    made.judger_generate = lambda *args, **kwargs: FAIL_MSG
    return made
