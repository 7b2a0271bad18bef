"""Rows of the twins: generated samples in the very columns of the published benchmarks (`twins.py` writes them)."""

from __future__ import annotations

import base64
import json
import pickle
import random
import zlib

from step3vl.types import Sample

from .hub import Row, letters
from .twin_source import Corpus, choice_rows, four_of, options_of, placed, png, words_of

SEED = 0


def mmstar(corpus: Corpus, num: int) -> list[Row]:
    kinds = ("recognition", "localization", "object counting")
    return [
        {
            "index": i,
            "image": png(sample.images[0]),
            "question": f"{question}\nOptions: " + ", ".join(f"{x}: {o}" for x, o in zip(letters(4), options)),
            "answer": sample.answer,
            "category": "fine-grained perception",
            "l2_category": kinds[i % 3],
        }
        for i, (sample, question, options) in enumerate(choice_rows("vqa-choice-level1")(corpus, num))
    ]


def mmbench(corpus: Corpus, num: int) -> list[Row]:
    return [
        {
            "index": i,
            "image": png(sample.images[0]),
            "question": question,
            "hint": "nan" if i % 2 else "Look at the whole image.",
            **dict(zip("ABCD", options)),
            "answer": sample.answer,
            "category": "object_localization",
            "L2-category": "finegrained_perception (instance-level)",
            "split": "dev",
            "source": "generated",
        }
        for i, (sample, question, options) in enumerate(choice_rows("vqa-choice-level2")(corpus, num))
    ]


def ai2d(corpus: Corpus, num: int) -> list[Row]:
    return [
        {
            "image": png(sample.images[0]),
            "question": question,
            "options": options,
            "answer": str(letters(4).index(str(sample.answer))),
        }
        for sample, question, options in choice_rows("knowledge-cards-level2")(corpus, num)
    ]


def vstar(corpus: Corpus, num: int) -> list[Row]:
    return [
        {
            "image": png(sample.images[0]),
            "text": f"{question} " + " ".join(f"({x}) {o}" for x, o in zip(letters(4), options)),
            "label": sample.answer,
            "category": "direct_attributes" if i % 2 else "relative_position",
        }
        for i, (sample, question, options) in enumerate(choice_rows("vqa-choice-level3")(corpus, num))
    ]


def mmvp(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    asked = [s for s in corpus.samples("vqa-compare-level1", 8 * num) if s.answer in ("yes", "no")]
    yes, no = ([s for s in asked if s.answer == answer] for answer in ("yes", "no"))
    for sample in [s for pair in zip(yes, no) for s in pair][: num - num % 2]:
        rows.append(
            {
                "Index": len(rows) + 1,
                "image": png(sample.images[0]),
                "Question": words_of(sample),
                "Options": "(a) yes (b) no",
                "Correct Answer": "(a)" if sample.answer == "yes" else "(b)",
            }
        )
    return rows


def mmmu(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    several = corpus.samples("vqa-images-level4", num // 4)
    one = choice_rows("knowledge-photo-level2")(corpus, num - num // 4)
    for i, (sample, question, options) in enumerate(one):
        rows.append(_mmmu_row(f"validation_Art_{i + 1}", f"<image 1> {question}", sample, "multiple-choice", options))
    for i, sample in enumerate(several):
        marks = " ".join(f"<image {n + 1}>" for n in range(len(sample.images)))
        rows.append(_mmmu_row(f"validation_Math_{i + 1}", f"{marks} {words_of(sample)}", sample, "open", []))
    return rows


def _mmmu_row(id: str, question: str, sample: Sample, kind: str, options: list[str]) -> Row:
    images = {f"image_{n}": png(sample.images[n - 1]) if n <= len(sample.images) else None for n in range(1, 8)}
    return {
        "id": id,
        "question": question,
        "options": str(options),
        "question_type": kind,
        "answer": sample.answer,
        **images,
    }


def blink(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    for i, sample in enumerate(corpus.samples("vqa-images-level3", num)):
        images = {f"image_{n}": png(sample.images[n - 1]) if n <= len(sample.images) else None for n in range(1, 5)}
        question = words_of(sample)
        prompt = f"{question}\nSelect from the following options.\n(A) yes\n(B) no"
        answer = "(A)" if sample.answer == "yes" else "(B)"
        rest = {"question": question, "prompt": prompt, "choices": ["yes", "no"], "answer": answer}
        rows.append({"idx": f"val_Multi-view_{i}", "sub_task": "Multi-view_Reasoning", **images, **rest})
    return rows


def all_angles(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    numbered = [s for s in corpus.samples("vqa-images-level4", 8 * num) if s.answer in ("1", "2", "3")][:num]
    for i, sample in enumerate(numbered):
        files = {f"images/{i:04d}_{n}.png": png(image)["bytes"] for n, image in enumerate(sample.images)}
        row = {"index": i, "folder": f"scene {i}", "category": "counting", "pair_idx": None, "image_path": list(files)}
        row |= {"question": words_of(sample), "A": "1", "B": "2", "C": "3", "sourced_dataset": "generated"}
        rows.append({**row, "answer": letters(3)[int(str(sample.answer)) - 1], "files": files})
    return rows


def mathvista(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    numbers = corpus.samples("education-geometry-level2", num - num // 3)
    for i, sample in enumerate([*numbers, *corpus.samples("knowledge-photo-level2", num // 3)]):
        is_choice = sample.answer_type == "letter"
        question, options = options_of(sample)
        rows.append(
            {
                "pid": str(i + 1),
                "question": question,
                "decoded_image": png(sample.images[0]),
                "choices": options if is_choice else None,
                "unit": None,
                "precision": None if is_choice else 0.0,
                "answer": options[letters(4).index(str(sample.answer))] if is_choice else sample.answer,
                "question_type": "multi_choice" if is_choice else "free_form",
                "answer_type": "text" if is_choice else "integer",
            }
        )
    return rows


def mathvision(corpus: Corpus, num: int) -> list[Row]:
    rng, rows = random.Random(SEED), []
    samples = corpus.samples("education-calculus-level3", num)
    for i, sample in enumerate(samples):
        options, letter = four_of(sample, samples, rng) if i % 2 else ([], str(sample.answer))
        rows.append(
            {
                "id": str(i + 1),
                "decoded_image": png(sample.images[0]),
                "question": f"{words_of(sample)}\n<image1>",
                "options": options,
                "answer": letter,
                "subject": "analytic geometry" if i % 2 else "algebra",
                "level": 1 + i % 5,
            }
        )
    return rows


def aime(corpus: Corpus, num: int) -> list[Row]:
    return [{"problem": words_of(s), "answer": s.answer} for s in corpus.samples("text-sums-level4", num)]


def hmmt(corpus: Corpus, num: int) -> list[Row]:
    halves = [(3, 4), (1, 3), (5, 2), (7, 6), (9, 8)]
    rows: list[Row] = []
    for i in range(num):
        a, b = halves[i % 5][0] + i, halves[i % 5][1]
        rows.append({"problem_idx": i + 1, "problem": f"What is ${a} / {b}$?", "answer": f"\\frac{{{a}}}{{{b}}}"})
    return rows


def ocrbench(corpus: Corpus, num: int) -> list[Row]:
    samples = [*corpus.samples("documents-words-level2", num - num // 4)]
    rows = [_ocr_row(sample, "Regular Text Recognition", "SVT") for sample in samples]
    formulas = corpus.samples("documents-formula-level2", num // 4)
    return rows + [_ocr_row(s, "Handwritten Mathematical Expression Recognition", "HME100k") for s in formulas]


def _ocr_row(sample: Sample, kind: str, dataset: str) -> Row:
    answer = [str(sample.answer)]
    image = png(sample.images[0])
    return {"image": image, "question": words_of(sample), "answer": answer, "question_type": kind, "dataset": dataset}


def simplevqa(corpus: Corpus, num: int) -> list[Row]:
    return [
        {"data_id": i, "image": png(s.images[0]), "question": words_of(s), "answer": s.answer, "language": "EN"}
        for i, s in enumerate(corpus.samples("knowledge-photo-level1", num))
    ]


def countbench(corpus: Corpus, num: int) -> list[Row]:
    return [
        {"image": png(s.images[0]), "text": "", "question": words_of(s), "number": int(str(s.answer))}
        for s in corpus.samples("grounding-count-level2", num)
    ]


def screenspot_v2(corpus: Corpus, num: int) -> list[Row]:
    return [
        {
            "image": png(s.images[0]),
            "instruction": words_of(s),
            "bbox": [float(value) for value in box],
            "data_type": "text" if i % 2 else "icon",
        }
        for i, (s, box) in enumerate(placed(corpus, "gui-click-level3", num))
    ]


def screenspot_pro(corpus: Corpus, num: int) -> list[Row]:
    return [
        {
            "image": png(s.images[0]),
            "instruction": words_of(s),
            "bbox": [int(value) for value in box],
            "img_size": list(s.images[0].size),
            "ui_type": "text" if i % 2 else "icon",
            "group": "Office",
        }
        for i, (s, box) in enumerate(placed(corpus, "gui-click-level4", num))
    ]


def osworld_g(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    for i, (sample, box) in enumerate(placed(corpus, "gui-click-level3", num)):
        x0, y0, x1, y1 = (float(value) for value in box)
        kind = ("bbox", "polygon", "refusal")[i % 3]
        area = {"bbox": [x0, y0, x1 - x0, y1 - y0], "polygon": [x0, y0, x1, y0, x1, y1, x0, y1], "refusal": [-1.0] * 4}
        text = "Click the button that is not there." if kind == "refusal" else words_of(sample)
        size = [float(side) for side in sample.images[0].size]
        row = {"image": png(sample.images[0]), "instruction": text, "image_size": size}
        rows.append({**row, "box_type": kind, "box_coordinates": area[kind]})
    return rows


def refcoco(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    for sample, box in placed(corpus, "grounding-box-level2", num):
        x0, y0, x1, y1 = (float(value) for value in box)
        phrase = words_of(sample).removeprefix("Box ").rstrip(".")
        rows.append({"image": png(sample.images[0]), "bbox": [x0, y0, x1 - x0, y1 - y0], "answer": [phrase]})
    return rows


def remi(corpus: Corpus, num: int) -> list[Row]:
    rows: list[Row] = []
    for i, sample in enumerate(corpus.samples("vqa-images-level4", num)):
        images = {f"image_{n}": png(sample.images[n - 1]) if n <= len(sample.images) else None for n in range(1, 7)}
        marks = " ".join(f"<image{n + 1}>" for n in range(len(sample.images)))
        task = "RefCoco" if i % 2 else "EmojiAlgebra"
        rows.append({"question": f"{marks} {words_of(sample)}", "label": sample.answer, "task": task, **images})
    return rows


def phyx(corpus: Corpus, num: int) -> list[Row]:
    return [
        {
            "index": i,
            "image": base64.b64encode(png(sample.images[0])["bytes"]).decode(),
            "question": f"{question}\nOptions:\n" + "\n".join(f"{x}: {o}" for x, o in zip(letters(4), options)),
            "answer": sample.answer,
            "category": "Mechanics",
        }
        for i, (sample, question, options) in enumerate(choice_rows("knowledge-cards-level2")(corpus, num))
    ]


def livecodebench(corpus: Corpus, num: int) -> list[Row]:
    """Sums and products, for stdin and as a method; hidden tests packed as the dataset packs them."""
    rows: list[Row] = []
    for i in range(num):
        pairs = [(n, n + i) for n in (1, 4, 9)]
        sign, answer = ("+", sum) if i % 2 else ("*", lambda pair: pair[0] * pair[1])
        as_method = i % 4 > 1
        tests = [
            {
                "input": f"{a}\n{b}" if as_method else f"{a} {b}\n",
                "output": str(answer((a, b))),
                "testtype": "functional" if as_method else "stdin",
            }
            for a, b in pairs
        ]
        packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[1:])))).decode()
        rows.append(
            {
                "question_id": f"twin_{i}",
                "question_content": f"Given two whole numbers a and b, give a {sign} b.",
                "starter_code": "class Solution:\n    def answer(self, a: int, b: int) -> int:" if as_method else "",
                "public_test_cases": json.dumps(tests[:1]),
                "private_test_cases": packed,
                "metadata": json.dumps({"func_name": "answer"} if as_method else {}),
                "contest_date": f"2025-0{1 + i % 6}-01T00:00:00",
                "difficulty": ("easy", "medium", "hard")[i % 3],
            }
        )
    return rows


def humaneval_v(corpus: Corpus, num: int) -> list[Row]:
    """Functions that name what a picture shows."""
    rows: list[Row] = []
    for i, sample in enumerate(corpus.samples("grounding-count-level2", num)):
        rows.append(
            {
                "qid": f"q{i}",
                "diagram": png(sample.images[0]),
                "ground_truth_solution": f"def solution(n: int) -> int:\n    return {sample.answer} * n",
                "ground_truth_diagram_description": str(sample.answer),
                "function_signature": f'def solution(n: int) -> int:\n    """{words_of(sample)} Times n."""',
                "task_type": "Validation",
                "test_script": f"def test():\n    assert solution(1) == {sample.answer}\n"
                f"    assert solution(3) == {3 * int(sample.answer or 0)}\n",
            }
        )
    return rows
