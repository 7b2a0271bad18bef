"""Answers of the generated corpus are exact: each is worked out again from pixels, geometry or mathematics."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections import Counter

import networkx as nx
import numpy as np
import pytest
import sympy

from step3vl.data.corpus import assets, code
from step3vl.data.corpus.draw import COLOURS, RGB
from step3vl.data.corpus.make import DOMAINS
from step3vl.data.corpus.scene import is_held_out
from step3vl.data.corpus.vqa import RELATIONS
from step3vl.types import IMAGE_MARK, Sample
from tests.data.drawn import NAME, centre, draw, name_at, questions


def shape_counts(sample: Sample) -> Counter:
    """Number of cells of each colour at level 0, read from the pixels."""
    pixels = np.asarray(sample.images[0].convert("RGB")).astype(int)
    found: Counter = Counter()
    for row in range(4):
        for column in range(4):
            cell = pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].reshape(-1, 3)
            bright = cell[cell.max(axis=1) > 200]
            if len(bright):
                median = np.median(bright, axis=0)
                found[min(COLOURS, key=lambda name: np.abs(median - RGB[name]).sum())] += 1
    return found


@pytest.mark.parametrize("level", [0, 1, 2, 3, 4])
def test_points_lie_in_their_region(level):
    for sample in draw("grounding/point", level, 10) + draw("gui/click", level, 10):
        if sample.answer_type == "exact":
            assert sample.answer == "none"
            continue
        x, y = ast.literal_eval(sample.answer)
        (gold,) = [region for region in sample.regions if region.label == "answer"]
        width, height = sample.images[gold.image].size
        assert gold.box[0] <= x * width / 1000 <= gold.box[2] and gold.box[1] <= y * height / 1000 <= gold.box[3]


def test_the_point_at_level_0_is_the_colour_that_was_asked_for():
    for sample in draw("grounding/point", 0, 60, "test", 1):
        colour, _ = re.search(NAME, sample.messages[0].content).groups()
        x, y = (value * 64 // 1000 for value in ast.literal_eval(sample.answer))
        pixels = np.asarray(sample.images[0])[y - 8 : y + 8, x - 8 : x + 8].reshape(-1, 3).astype(int)
        bright = np.median(pixels[pixels.max(axis=1) > 200], axis=0)
        assert min(COLOURS, key=lambda name: np.abs(bright - RGB[name]).sum()) == colour
        assert (x - 8) % 16 == 0 and (y - 8) % 16 == 0


def test_boxes_are_their_region():
    for sample in draw("grounding/box", 2, 20):
        box = ast.literal_eval(sample.answer)
        (gold,) = [region for region in sample.regions if region.label == "answer"]
        width, height = sample.images[0].size
        scaled = np.array(box) / 1000 * np.array([width, height, width, height])
        assert np.allclose(scaled, gold.box, atol=0.1)


def test_counts_agree_with_pixels_and_regions():
    samples = draw("grounding/count", 0, 150, "test", 1) + draw("grounding/count", 0, 50)
    for sample in samples:
        assert int(sample.answer) == len(sample.regions)
        counts = shape_counts(sample)
        for question, answer in questions(sample):
            colour = re.fullmatch(r"How many (\w+) shapes\?", question)
            if colour:
                assert counts[colour.group(1)] == int(answer)
    answers = Counter(sample.answer for sample in samples[:150])
    assert set(answers) == set("0123456") and max(answers.values()) < 0.3 * 150


def test_yes_and_no_follow_from_the_geometry_and_balance():
    answers: Counter = Counter()
    for level in (0, 1, 2, 3):
        for sample in draw("vqa/spatial", level, 60, "test", 1):
            (question, answer) = questions(sample)[0]
            (relation,) = [r for r in RELATIONS if f" {r} the " in question]
            first, second = sample.regions
            (ax, ay), (bx, by) = centre(first), centre(second)
            assert question == f"Is the {name_at(sample, first)} {relation} the {name_at(sample, second)}?" or level > 0
            truth = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]
            assert answer == ("yes" if truth else "no")
            answers[answer] += 1
    assert 0.38 < answers["yes"] / answers.total() < 0.62


def test_attributes_are_what_is_drawn():
    for sample in draw("vqa/attributes", 0, 40, "test", 1):
        colour, shape = name_at(sample, sample.regions[0]).split()
        question, answer = questions(sample)[0]
        assert (question, answer) in [
            (f"What shape is {colour}?", shape),
            (f"What colour is the {shape}?", colour),
        ]
        assert is_held_out(shape, colour)


def test_digits_are_read_back_from_their_pixels():
    images, values = assets.digit_images()
    first = len(values) - assets.NUM_HELD_OUT_DIGITS
    known = {np.asarray(image).tobytes(): (values[k], k >= first) for k, image in enumerate(images)}
    for split in ("train", "test"):
        for sample in draw("documents/digits", 0, 40, split):
            pixels = np.asarray(sample.images[0])[..., 0]
            for question, answer in questions(sample):
                row = int(question.removeprefix("Read row ").rstrip(".")) - 1
                cells = [pixels[row * 16 : row * 16 + 16, c * 16 : c * 16 + 16] for c in range(len(answer))]
                found = [known[cell.copy().tobytes()] for cell in cells]
                assert "".join(str(value) for value, _ in found) == answer
                assert {held for _, held in found} == {split == "test"}


def test_sums_are_right():
    for level in (0, 1, 2, 3, 4):
        for sample in draw("text/sums", level, 30):
            for question, answer in questions(sample):
                power = re.fullmatch(r"What is (\d+)\^(\d+) modulo (\d+)\?", question)
                if power:
                    base, exponent, n = map(int, power.groups())
                    expected = sympy.Mod(sympy.Integer(base) ** exponent, n)
                else:
                    expected = sympy.sympify(question.removesuffix("=?"))
                assert int(answer.split("\n")[-1]) == expected


def test_python_questions_print_what_they_say():
    for level in (0, 1, 2, 3, 4):
        for sample in draw("text/python", level, 20):
            for question, answer in questions(sample):
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(question.split("\n", 1)[1], {})
                assert out.getvalue().rstrip("\n") == answer


def test_graph_questions_have_the_right_way():
    for sample in draw("text/graph", 4, 20):
        for question, answer in questions(sample):
            roads: nx.Graph = nx.Graph()
            for a, b, length in re.findall(r"(\w)-(\w) (\d)", question):
                roads.add_edge(a, b, weight=int(length))
            a, b = re.search(r"from (\w) to (\w)\?", question).groups()
            if a in roads and b in roads and nx.has_path(roads, a, b):
                assert int(answer.split("\n")[-1]) == nx.shortest_path_length(roads, a, b, weight="weight")
            else:
                assert answer == "none"


def test_equations_hold(monkeypatch):
    seen: list[str] = []
    original = DOMAINS["education"]["equation"].generate.__globals__["formula_mask"]
    monkeypatch.setitem(
        DOMAINS["education"]["equation"].generate.__globals__,
        "formula_mask",
        lambda latex, *rest: seen.append(latex) or original(latex, *rest),
    )
    x = sympy.Symbol("x")
    for level in (2, 3, 4):
        seen.clear()
        samples = draw("education/equation", level, 12)
        for sample, latex in zip(samples, seen, strict=True):
            left, right = re.sub(r"(\d)x", r"\1*x", latex.replace("^", "**")).split(" = ")
            roots = sorted(sympy.solve(sympy.sympify(left) - sympy.sympify(right), x))
            assert int(sample.answer) in roots and len(roots) == (2 if level == 4 else 1)
            if level == 4:
                assert int(sample.answer) == (roots[1] if "larger" in sample.messages[0].content else roots[0])
            assert sample.messages[-1].content.endswith(f"x = {sample.answer}")


def test_charts_are_drawn_by_their_own_source():
    for level in (2, 3, 4):
        (sample,) = draw("code/chart", level, 1)
        calls = []
        for line in sample.answer.split("\n"):
            call = ast.parse(line).body[0].value
            options = {key.arg: ast.literal_eval(key.value) for key in call.keywords}
            calls.append((call.func.attr, [ast.literal_eval(value) for value in call.args], options))
        image = sample.images[0]
        inches, size = (image.width / 100, image.height / 100), 7 if level == 2 else 9
        again = [np.asarray(code.draw_chart(calls, inches, family, size)) for family in code.TRAIN_FAMILIES]
        assert any(np.array_equal(np.asarray(image), pixels) for pixels in again)


def test_absent_things_are_refused():
    answers = Counter(s.answer_type for s in draw("gui/click", 3, 120, "test", 1))
    assert 3 <= answers["exact"] <= 35 and answers["point"] > 60
    for sample in draw("gui/click", 3, 120, "test", 1):
        if sample.answer == "none":
            label = sample.messages[0].content.removeprefix(f"{IMAGE_MARK}Click ").rstrip(".")
            assert label not in [region.label for region in sample.regions]


def test_letters_name_four_different_options():
    for sample in draw("vqa/choice", 2, 20, "test", 1):
        options = re.findall(r"^([A-F])\. (.+)$", sample.messages[0].content, re.MULTILINE)
        assert [letter for letter, _ in options] == list("ABCD") and len({text for _, text in options}) == 4
    letters = Counter(s.answer for s in draw("vqa/choice", 2, 120, "test", 1))
    assert set(letters) == set("ABCD") and max(letters.values()) < 60


def test_earlier_answers_do_not_give_later_ones_away():
    for name, level in (("vqa/attributes", 0), ("vqa/choice", 2), ("knowledge/mosaic", 3)):
        for sample in draw(name, level, 30):
            for k, (question, answer) in enumerate(questions(sample)):
                told = " ".join(part for turn in questions(sample)[:k] for part in turn)
                if name == "vqa/attributes":  # "What shape is red?" "circle": later neither red nor circle is asked
                    subject = question.rstrip("?").split()[-1]
                    assert subject not in told.split() and f"{subject}?" not in told and answer not in told.split()
                elif name == "knowledge/mosaic" and question.startswith("What is in"):
                    assert answer not in told
    for name in ("knowledge/photo", "code/shapes"):
        assert all(len(sample.messages) == 2 for sample in draw(name, 0, 10))


def test_ways_in_graphs_are_there_half_the_time():
    answers = Counter(answer for sample in draw("text/graph", 2, 60) for _, answer in questions(sample))
    assert set(answers) == {"yes", "no"} and 0.35 < answers["yes"] / answers.total() < 0.65
