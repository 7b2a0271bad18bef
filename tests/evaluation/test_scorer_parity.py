"""Our scorers beside lmms-eval's (0.7.3) on the same phrasings: equal, or different for a reason that is written."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from step3vl.evaluation import Case, benchmarks
from step3vl.evaluation.benchmarks.pointing import rectangle
from step3vl.types import Message, Prompt

TABLE = json.loads((Path(__file__).parent / "phrasings/scorers.json").read_text())
BOX = (0.1, 0.2, 0.3, 0.4)
SIZE = (1000, 500)


def case(name: str, row: dict) -> Case:
    gold = {
        "ocrbench": lambda: {"answers": row["gold"], "is_formula": row["dataset"] == "HME100k"},
        "mmmu_open": lambda: {"options": [], "answers": [row["gold"]]},
        "countbench": dict,
        "aime2025": dict,
        "simplevqa": dict,
        "refcoco": lambda: {"box": BOX, "size": SIZE},
        "vstar": lambda: {"options": ["first", "second", "third", "fourth"]},
        "mmvp": lambda: {"options": ["first", "second"]},
    }.get(name, lambda: {"polygon": rectangle(BOX), "size": SIZE})()
    kind = {"mmmu_open": "contains", "vstar": "letter", "mmvp": "letter"}.get(name, "other")  # of MMMU alone it is used
    prompt = Prompt(messages=[Message(role="user", content="?")])
    answer = {"countbench": "7", "aime2025": "70"}.get(name) or str(row.get("gold", ""))
    return Case(id="0", prompt=prompt, answer=answer, answer_type=kind, group="bbox", gold=gold)


KINDS = {
    "ocrbench": benchmarks.OCRBench,
    "screenspot_v2": benchmarks.ScreenSpotV2,
    "screenspot_pro": benchmarks.ScreenSpotPro,
    "osworld_g": benchmarks.OSWorldG,
    "countbench": benchmarks.CountBench,
    "mmmu_open": benchmarks.MMMU,
    "aime2025": benchmarks.AIME2025,
    "simplevqa": benchmarks.SimpleVQA,
    "refcoco": benchmarks.RefCOCO,
    "vstar": benchmarks.VStar,
    "mmvp": benchmarks.MMVP,
}


@pytest.mark.parametrize("name", KINDS)
def test_ours_are_as_recorded_and_differences_have_reasons(name):
    rows, made = TABLE[name], KINDS[name]("nowhere")
    assert len(rows) >= 40
    for row in rows:
        assert made.score(case(name, row), row["said"]) == row["ours"], row
        assert (row["ours"] == row["lmms"]) != ("why" in row), row


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_theirs_are_as_recorded(name, monkeypatch):
    needed = {"aime2025": "openai", "refcoco": "pycocoevalcap"}.get(name)
    if needed:
        pytest.importorskip(needed, reason=f"lmms-eval's {name} needs {needed}")
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # some tasks ask for one when they are imported
    monkeypatch.delenv("PROCESSOR", raising=False)
    for row in TABLE[name]:
        assert theirs(name, row) == row["lmms"], row


def theirs(name: str, row: dict) -> float:
    said, image = row["said"], Image.new("RGB", SIZE)
    width, height = SIZE
    pixels = [BOX[0] * width, BOX[1] * height, BOX[2] * width, BOX[3] * height]
    match name:
        case "ocrbench":
            from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results as score

            doc = {"answer": row["gold"], "dataset": row["dataset"], "question_type": "x"}
            return float(score(doc, [said])["ocrbench_accuracy"]["score"])
        case "screenspot_v2":
            from lmms_eval.tasks.screenspot_v2.utils import screenspot_v2_process_results as score

            doc = {"bbox": list(BOX), "image_width": width, "image_height": height, "data_type": "text"}
            return float(score(doc, [said])["screenspot_v2_action_acc"]["correct"])
        case "screenspot_pro":
            from lmms_eval.tasks.screenspot_pro.utils import screenspot_pro_process_results as score

            doc = {"bbox": pixels, "img_size": list(SIZE), "ui_type": "text", "group": "g", "image": image}
            return float(next(iter(score(doc, [said]).values()))["correct"])
        case "osworld_g":
            from lmms_eval.tasks.osworld_g.utils import osworld_g_process_results as score

            box = [pixels[0], pixels[1], pixels[2] - pixels[0], pixels[3] - pixels[1]]
            doc = {"box_type": "bbox", "box_coordinates": box, "image_size": list(SIZE), "image": image}
            return float(score(doc, [said])["osworld_g_acc"]["correct"])
        case "countbench":
            from lmms_eval.tasks.countbenchqa.utils import countbenchqa_process_results as score

            return float(score({"number": 7}, [said])["acc"])
        case "aime2025":
            from lmms_eval.tasks.aime.utils import process_results

            try:
                return float(process_results({"answer": "70"}, [said])["exact_match"])
            except AssertionError:  # on a box that is none of theirs
                return 0.0
        case "simplevqa":
            from lmms_eval.tasks.simplevqa.utils import simplevqa_process_results as score

            return float(score({"answer": row["gold"]}, [said])["exact_match"])
        case "refcoco":
            from lmms_eval.tasks.refcoco.utils_rec import compute_iou, parse_float_sequence_within

            return float(compute_iou(list(BOX), parse_float_sequence_within(said)) >= 0.5)
        case "vstar":
            from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter

            return float(extract_answer_letter(said) == "B")
        case "mmvp":
            from lmms_eval.tasks.mmvp.utils import _extract_answer_letter

            return float(_extract_answer_letter(said) == "B")
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    return float(eval_open(row["gold"], parse_open_response(said)))
