"""What training shows and what is held out do not meet, rule by rule."""

from __future__ import annotations

import random
import re
from functools import partial

import numpy as np

from step3vl.data.corpus import assets, code, documents, gui, knowledge
from step3vl.data.corpus.draft import (
    draw_number,
    draw_operands,
    held_out_layout,
    held_out_number,
    held_out_operands,
)
from step3vl.data.corpus.make import DOMAINS
from step3vl.data.corpus.scene import all_pairs, is_held_out, pairs
from step3vl.types import Region
from tests.data.drawn import NAME, draw, name_at, questions


def _watch_font(original, seen, image, character, name, *rest):
    seen.add(name)
    original(image, character, name, *rest)


def test_fonts_and_formula_fonts_do_not_meet(monkeypatch):
    assert not set(assets.TRAIN_LETTER_FONTS) & set(assets.HELD_OUT_LETTER_FONTS)
    assert not set(documents.TRAIN_MATHS) & set(documents.HELD_OUT_MATHS)
    assert not set(code.TRAIN_FAMILIES) & set(code.HELD_OUT_FAMILIES)
    used: dict[bool, set[str]] = {True: set(), False: set()}
    original = documents.draw_glyph
    for held_out in (True, False):
        monkeypatch.setattr(documents, "draw_glyph", partial(_watch_font, original, used[held_out]))
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
            for x, y in ((1 + 16 * column, 1 + 16 * row) for row in range(4) for column in range(4)):
                if np.asarray(sample.images[0])[y : y + 14, x : x + 14].max() > 0:
                    region = Region(label="", box=(x, y, x + 14, y + 14))
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
