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
    }.get(name, lambda: {"polygon": rectangle(BOX), "size": SIZE})()
    kind = {"ocrbench": "contains", "mmmu_open": "contains", "countbench": "number"}.get(name, "point")
    prompt = Prompt(messages=[Message(role="user", content="?")])
    return Case(id="0", prompt=prompt, answer="7", answer_type=kind, group="bbox", gold=gold)


KINDS = {
    "ocrbench": benchmarks.OCRBench,
    "screenspot_v2": benchmarks.ScreenSpotV2,
    "screenspot_pro": benchmarks.ScreenSpotPro,
    "osworld_g": benchmarks.OSWorldG,
    "countbench": benchmarks.CountBench,
    "mmmu_open": benchmarks.MMMU,
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
def test_theirs_are_as_recorded(name):
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
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    return float(eval_open(row["gold"], parse_open_response(said)))
