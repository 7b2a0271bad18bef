"""The generated corpus: exact answers, splits that do not meet, the same bytes whatever the number of processes."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import sympy
import yaml
from rich.console import Console

from step3vl.data.corpus import assets, code, documents, gui, knowledge
from step3vl.data.corpus.draft import (
    draw_number,
    draw_operands,
    held_out_layout,
    held_out_number,
    held_out_operands,
)
from step3vl.data.corpus.draw import CELL, COLOURS, RGB, SHAPES
from step3vl.data.corpus.make import DOMAINS, Manifest, draw_samples, make_corpus
from step3vl.data.corpus.scene import all_pairs, is_held_out, pairs
from step3vl.data.corpus.vqa import RELATIONS
from step3vl.data.schema import from_json, to_json
from step3vl.data.shards import ShardReader, find_shards
from step3vl.types import IMAGE_MARK, Message, Region, Sample

ALL = [(d, s, level) for d, subsets in DOMAINS.items() for s, subset in subsets.items() for level in subset.levels]
QUIET = Console(file=io.StringIO())
NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"


def draw(name: str, level: int, num: int, split: str = "train", turns: int = 6) -> list[Sample]:
    domain, subset = name.split("/")
    return list(draw_samples(0, split, domain, subset, level, num, turns))


def questions(sample: Sample) -> list[tuple[str, str]]:
    """(question, answer) of every turn, without image marks."""
    texts = [message.content.replace(IMAGE_MARK, "") for message in sample.messages]
    return list(zip(texts[::2], texts[1::2]))


# ------------------------------------------------------------------------------------------------ every subset


@pytest.mark.parametrize(("domain", "subset", "level"), ALL)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_subset_and_level_makes_whole_samples(domain, subset, level, split):
    turns = 6 if split == "train" else 1
    for sample in draw_samples(3, split, domain, subset, level, 3, turns):
        from_json(json.loads(json.dumps(to_json(sample))), sample.images, "here")
        assert (sample.domain, sample.subset, sample.level) == (domain, subset, level)
        assert [message.role for message in sample.messages] == ["user", "assistant"] * (len(sample.messages) // 2)
        assert 1 <= len(sample.messages) // 2 <= turns
        assert sample.messages[0].content.startswith(IMAGE_MARK * len(sample.images))
        assert all(IMAGE_MARK not in message.content for message in sample.messages[1:])
        assert sample.answer and sample.answer in sample.messages[-1].content
        assert bool(sample.images) == (domain != "text")
        for image in sample.images:
            assert image.size == (64, 64) if level == 0 else max(image.size) <= 960
        for region in sample.regions:
            size = sample.images[region.image].size
            assert 0 <= region.box[0] < region.box[2] <= size[0] and 0 <= region.box[1] < region.box[3] <= size[1]
        if sample.answer_type == "letter":
            assert re.search(rf"^{sample.answer}\. ", questions(sample)[-1][0], re.MULTILINE)
        if sample.answer_type == "number":
            float(sample.answer)


def test_all_eight_domains_and_many_levels():
    assert set(DOMAINS) == {"knowledge", "education", "documents", "code", "grounding", "vqa", "gui", "text"}
    for domain in DOMAINS:
        assert len({level for d, _, level in ALL if d == domain}) >= 4, domain


def test_level_0_lies_on_the_grid():
    for name in ("grounding/point", "vqa/attributes", "vqa/spatial", "code/shapes"):
        for sample in draw(name, 0, 20):
            pixels = np.asarray(sample.images[0].convert("RGB"))
            assert pixels.shape == (64, 64, 3)
            borders = np.concatenate([pixels[0::CELL], pixels[CELL - 1 :: CELL]])  # no shape crosses a cell's edge
            assert borders.max() == 0
            cells = pixels.reshape(4, 16, 4, 16, 3).max(axis=(1, 3, 4))
            assert 1 <= (cells > 0).sum() <= 6


# ------------------------------------------------------------------------------------------------ exact answers


def by_name(sample: Sample) -> dict[str, tuple[float, float]]:
    """Centre of each named shape, from the pixels: the mean place of its colour, level 0 and 1 only."""
    return {region.label: centre(region) for region in sample.regions}


def centre(region: Region) -> tuple[float, float]:
    return (region.box[0] + region.box[2]) / 2, (region.box[1] + region.box[3]) / 2


def shape_counts(sample: Sample) -> Counter:
    """Cells of each colour at level 0, read from the pixels."""
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


def name_at(sample: Sample, region: Region) -> str:
    """Colour from the pixels, shape by the best match of its outline, at level 0."""
    from step3vl.data.corpus.draw import shape_mask

    x0, y0, x1, y1 = map(int, region.box)
    pixels = np.asarray(sample.images[0])[y0:y1, x0:x1].astype(float)
    alpha = pixels.max(axis=2) / pixels.max()
    shape = min(SHAPES, key=lambda s: np.abs(alpha - np.asarray(shape_mask(s, x1 - x0)) / 255).sum())
    bright = np.median(pixels.reshape(-1, 3)[alpha.ravel() > 0.9], axis=0)
    return f"{min(COLOURS, key=lambda c: np.abs(bright - RGB[c]).sum())} {shape}"


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
        for sample in draw("education/equation", level, 12):
            left, right = re.sub(r"(\d)x", r"\1*x", seen[-1].replace("^", "**")).split(" = ")
            roots = sorted(sympy.solve(sympy.sympify(left) - sympy.sympify(right), x))
            assert int(sample.answer) in roots and len(roots) == (2 if level == 4 else 1)
            if level == 4:
                assert int(sample.answer) == (roots[1] if "larger" in sample.messages[0].content else roots[0])
            assert sample.messages[-1].content.endswith(f"x = {sample.answer}")
            seen.clear()


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


# ------------------------------------------------------------------------------------------------ held out


def test_fonts_and_formula_fonts_do_not_meet(monkeypatch):
    assert not set(assets.TRAIN_LETTER_FONTS) & set(assets.HELD_OUT_LETTER_FONTS)
    assert not set(documents.TRAIN_MATHS) & set(documents.HELD_OUT_MATHS)
    assert not set(code.TRAIN_FAMILIES) & set(code.HELD_OUT_FAMILIES)
    used: dict[bool, set[str]] = {True: set(), False: set()}
    original = documents.draw_glyph
    for held_out in (True, False):
        monkeypatch.setattr(
            documents,
            "draw_glyph",
            lambda im, ch, name, *rest: used[held_out].add(name) or original(im, ch, name, *rest),
        )
        for k in range(60):
            documents.words(random.Random(k), 0, held_out, 1)
    assert used[False] <= set(assets.TRAIN_LETTER_FONTS) and used[True] <= set(assets.HELD_OUT_LETTER_FONTS)
    assert len(used[False]) > 10 and len(used[True]) == 5


def test_pairs_do_not_meet():
    assert len(pairs(True)) == 7 and len(pairs(False)) == 42 and not set(pairs(True)) & set(pairs(False))
    assert len({shape for shape, _ in pairs(True)}) == 7 and len({colour for _, colour in pairs(True)}) == 7
    assert set(all_pairs(True)) == set(pairs(True)) | set(pairs(False)) and all_pairs(False) == pairs(False)
    for name in ("grounding/point", "grounding/box", "vqa/spatial", "vqa/choice", "code/shapes", "vqa/images"):
        for level in DOMAINS[name.split("/")[0]][name.split("/")[1]].levels[:3]:
            train = " ".join(m.content for sample in draw(name, level, 15) for m in sample.messages)
            named = {(shape, colour) for colour, shape in re.findall(NAME, train)}
            if name not in ("vqa/choice", "code/shapes"):
                assert named and not named & set(pairs(True))
    for name in ("grounding/point", "vqa/spatial"):
        for sample in draw(name, 0, 30, "test", 1):
            assert any(is_held_out(s, c) for c, s in re.findall(NAME, sample.messages[0].content))


def test_train_scenes_never_draw_a_held_out_pair():
    for name in ("grounding/point", "vqa/attributes", "grounding/count"):
        for sample in draw(name, 0, 25):
            for region in [
                Region(label="", box=(c * 16 + 1, r * 16 + 1, c * 16 + 15, r * 16 + 15))
                for r in range(4)
                for c in range(4)
            ]:
                x0, y0, x1, y1 = map(int, region.box)
                if np.asarray(sample.images[0])[y0:y1, x0:x1].max() > 0:
                    colour, shape = name_at(sample, region).split()
                    assert not is_held_out(shape, colour)


def test_numbers_and_operands_do_not_meet():
    rng = random.Random(0)
    for num_digits in (2, 3):
        train = {draw_number(rng, num_digits, False) for _ in range(3000)}
        test = {draw_number(rng, num_digits, True) for _ in range(500)}
        assert not train & test and all(n % 7 == 3 for n in test) and all(len(str(n)) == num_digits for n in train)
    assert {draw_number(rng, 1, True) for _ in range(300)} == set(range(10))
    assert not any(held_out_number(n) for n in range(10))
    train = {draw_operands(rng, 0, 9, False) for _ in range(3000)}
    test = {draw_operands(rng, 0, 9, True) for _ in range(1000)}
    assert not train & test and train | test == {(a, b) for a in range(10) for b in range(10)}
    for split in ("train", "test"):
        for sample in draw("text/sums", 0, 40, split) + draw("text/sums", 1, 40, split):
            for question, _ in questions(sample):
                assert held_out_operands(*map(int, re.findall(r"\d+", question))) == (split == "test")
        for sample in draw("documents/digits", 0, 40, split):
            for _, answer in questions(sample):
                assert held_out_number(int(answer)) == (split == "test") or len(answer) == 1


def test_digit_writers_do_not_meet():
    train = {row for value in range(10) for row in assets.digits_of(value, False)}
    test = {row for value in range(10) for row in assets.digits_of(value, True)}
    assert len(test) == 397 and len(train) == 1400 and max(train) < min(test)


def test_layouts_do_not_meet(monkeypatch):
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for held_out in (True, False):

        def watch(layout, held_out=held_out):
            result = held_out_layout(layout)
            if result == held_out:
                seen[held_out].add(repr(layout))
            return result

        monkeypatch.setattr(gui, "held_out_layout", watch)
        for k in range(150):
            gui.click(random.Random(k), 0, held_out, 1)
    assert len(seen[True]) > 100 and len(seen[False]) > 100 and not seen[True] & seen[False]


def test_photographs_are_cut_from_halves_that_do_not_meet():
    rng = random.Random(0)
    for number in range(len(assets.PHOTOS)):
        a, b = assets.photo_region(number, False), assets.photo_region(number, True)
        assert a[2] <= b[0] or a[3] <= b[1]
        for held_out, region in ((False, a), (True, b)):
            for level in (0, 1, 2, 4):
                box = knowledge.crop_box(rng, number, level, held_out)
                assert region[0] <= box[0] < box[2] <= region[2] and region[1] <= box[1] < box[3] <= region[3]
        width, height = assets.photo(number).size
        assert max(a[2], b[2]) <= width and max(a[3], b[3]) <= height


def test_borrowed_bytes_carry_their_source():
    (digits,) = draw("documents/digits", 0, 1)
    assert (digits.source, digits.licence) == ("sklearn digits (UCI optdigits)", "CC-BY-4.0")
    for sample in draw("knowledge/mosaic", 3, 5):
        assert len(sample.source.split("; ")) == 4 and "scikit" in sample.source and sample.licence != "Apache-2.0"
    (words,) = draw("documents/words", 0, 1)
    assert (words.source, words.licence) == ("generated", "Apache-2.0")


# ------------------------------------------------------------------------------------------------ making a corpus

RECIPE = {
    "turns": 3,
    "samples_per_shard": 5,
    "splits": {
        "train": {"documents/digits": {0: 12}, "text/sums": {0: 4, 2: 3}, "vqa/images": {3: 2}},
        "test": {"documents/digits": {0: 4}, "gui/click": {3: 2}},
    },
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_bytes_with_one_and_two_processes(tmp_path):
    one = make_corpus(tmp_path / "one", RECIPE, num_processes=1, console=QUIET)
    two = make_corpus(tmp_path / "two", RECIPE, num_processes=2, console=QUIET)
    assert one == two and files(tmp_path / "one") == files(tmp_path / "two")
    assert make_corpus(tmp_path / "three", RECIPE, seed=1, num_processes=1, console=QUIET).shards != one.shards
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "three", "two"]  # no temporary folder is left


def test_manifest_and_layout(tmp_path):
    manifest = make_corpus(tmp_path / "c", RECIPE, num_processes=1, console=QUIET)
    assert [shard["file"] for shard in manifest.shards[:3]] == [
        f"train/documents-digits-level0-00000{k}.tar" for k in range(3)
    ]
    assert [shard["num_samples"] for shard in manifest.shards[:3]] == [5, 5, 2]
    assert manifest == Manifest.load(tmp_path / "c")
    assert manifest.totals["train"]["documents"]["num_samples"] == 12
    assert manifest.totals["train"]["vqa"]["num_images"] == 4
    samples = [s for path in find_shards(tmp_path / "c" / "train") for s in ShardReader(path)]
    assert len(samples) == 21 and len({sample.id for sample in samples}) == 21
    assert sum(len(s.messages) // 2 for s in samples) == sum(
        total["num_turns"] for total in manifest.totals["train"].values()
    )
    assert all(len(s.messages) == 2 for p in find_shards(tmp_path / "c" / "test") for s in ShardReader(p))
    direct = list(draw_samples(0, "train", "documents", "digits", 0, 2, 3, first=10))
    stored = list(ShardReader(tmp_path / "c/train/documents-digits-level0-000002.tar"))
    assert [s.messages for s in stored] == [s.messages for s in direct]
    assert np.array_equal(np.asarray(stored[1].images[0]), np.asarray(direct[1].images[0]))


def test_reuse_refuse_and_overwrite(tmp_path):
    small = {"splits": {"train": {"text/sums": {0: 3}}}}
    other = {"splits": {"train": {"text/sums": {0: 4}}}}
    out = tmp_path / "c"
    make_corpus(out, small, num_processes=1, console=QUIET)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    console = Console(file=io.StringIO(), width=200)
    make_corpus(out, small, num_processes=1, console=console)
    assert "reused" in console.file.getvalue() and (out / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="another recipe; choose another folder or pass overwrite"):
        make_corpus(out, other, console=QUIET)
    with pytest.raises(ValueError, match=r"another seed \(0, asked for 5\)"):
        make_corpus(out, small, seed=5, console=QUIET)
    assert make_corpus(out, other, num_processes=1, overwrite=True, console=QUIET).shards[0]["num_samples"] == 4
    (shard,) = find_shards(out / "train")
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match="is missing or has changed"):
        make_corpus(out, other, console=QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"no manifest.json"):
            make_corpus(tmp_path / "mine", small, overwrite=overwrite, console=QUIET)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_an_interrupted_make_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    calls = []

    def stop(rng, level, held_out, turns):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return DOMAINS["text"]["python"].generate(rng, 0, held_out, turns)

    monkeypatch.setitem(DOMAINS["text"], "sums", type(DOMAINS["text"]["sums"])(stop, (0,)))
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "c", {"splits": {"train": {"text/sums": {0: 5}}}}, num_processes=1, console=QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"splits": {"train": {"documents/digit": {0: 1}}}},
            "no subset 'documents/digit'; the nearest are documents/digits",
        ),
        ({"splits": {"train": {"grounding/box": {0: 1}}}}, "subset 'grounding/box' has no level 0; it has 1, 2, 3, 4"),
        ({"splits": {"train": {"text/sums": {"a": 1}}}}, "splits.train.text/sums.a: a level is one of"),
        ({"splits": {"train": {"text/sums": {0: 0}}}}, "whole number from 1, got 0"),
        ({"split": {}}, "unknown key 'split'; accepted are seed, turns"),
        ({"splits": {}}, "key 'splits' must map"),
        ({"turns": 0, "splits": {"t": {}}}, "key 'turns' must be a whole number from 1, got 0"),
    ],
)
def test_recipe_errors(tmp_path, recipe, message):
    with pytest.raises(ValueError) as error:
        make_corpus(tmp_path / "c", recipe, console=QUIET)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny/corpus/default.yaml", "corpus/default.yaml"])
def test_shipped_recipes_name_everything_there_is(name):
    import step3vl

    recipe = yaml.safe_load((Path(step3vl.__file__).parent / "configs" / name).read_text())
    listed = {(*key.split("/"), level) for key, levels in recipe["splits"]["train"].items() for level in levels}
    assert listed == set(ALL)
    factor = 1 if name.startswith("tiny") else 10
    assert recipe["splits"]["train"]["documents/digits"][0] == 8000 * factor
    assert recipe["splits"]["test"]["documents/digits"][0] == 300 * factor
    assert recipe["splits"]["val"]["gui/click"] == {0: 60 * factor}


def test_messages_hold_no_list_of_options_by_accident():
    for sample in draw("vqa/choice", 2, 20, "test", 1):
        options = re.findall(r"^([A-F])\. (.+)$", sample.messages[0].content, re.MULTILINE)
        assert [letter for letter, _ in options] == list("ABCD") and len({text for _, text in options}) == 4
    letters = Counter(s.answer for s in draw("vqa/choice", 2, 120, "test", 1))
    assert set(letters) == set("ABCD") and max(letters.values()) < 60
    assert isinstance(sample.messages[0], Message)
