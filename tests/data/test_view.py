"""Contact sheets and tables of a shard."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from step3vl.data.corpus.make import draw_samples
from step3vl.data.shards import write_shards
from step3vl.data.stats import count_shards, print_stats
from step3vl.data.view import ANSWER, TILE, contact_sheet, picture


@pytest.fixture
def folder(tmp_path):
    for split, domain, subset, level, num in (
        ("train", "grounding", "point", 0, 9),
        ("train", "text", "sums", 0, 4),
        ("test", "vqa", "images", 3, 3),
    ):
        samples = draw_samples(0, split, domain, subset, level, num, 2 if split == "train" else 1)
        write_shards(samples, tmp_path / split, f"{domain}-{subset}-level{level}", 5)
    return tmp_path


def test_sheet_has_a_tile_for_every_sample(folder):
    out = contact_sheet(folder / "train" / "grounding-point-level0-000000.tar", folder / "out" / "a.png", num=24)
    sheet = Image.open(out)
    assert sheet.width == 5 * (TILE + 12) + 12  # five samples in the first shard
    pixels = np.asarray(sheet)
    for k in range(5):
        tile = pixels[30 : 30 + TILE, 12 + k * (TILE + 12) : 12 + k * (TILE + 12) + TILE]
        assert (tile == ANSWER).all(axis=2).sum() > 100  # the answer's green box and point
        assert (tile == 0).all(axis=2).mean() > 0.3  # the black canvas
    again = contact_sheet(folder / "train" / "text-sums-level0-000000.tar", folder / "b.png", num=2)
    assert Image.open(again).width == 2 * (TILE + 12) + 12


def test_the_green_box_is_where_the_region_is():
    (sample,) = draw_samples(0, "train", "grounding", "point", 0, 1)
    (gold,) = [region for region in sample.regions if region.label == "answer"]
    shown = np.asarray(picture(sample, 160))
    rows, columns = np.nonzero((shown == ANSWER).all(axis=2))
    scale = 160 / 64
    assert (columns.min(), rows.min()) == (int(gold.box[0] * scale), int(gold.box[1] * scale))
    assert abs(columns.max() - gold.box[2] * scale) <= 1.5 and abs(rows.max() - gold.box[3] * scale) <= 1.5


def test_several_images_are_shown_side_by_side(folder):
    (sample,) = draw_samples(0, "test", "vqa", "images", 3, 1)
    shown = np.asarray(picture(sample, 168))
    assert shown[10:80, 5:80].std() > 0 and shown[10:80, 88:160].std() > 0


def test_counts_and_tables(folder):
    counts, damage = count_shards(sorted(folder.rglob("*.tar")), count_tokens=lambda sample: (7, 16))
    assert damage == []
    row = counts[("train", "grounding", "point", 0)]
    assert row.num_samples == 9 and row.num_images == 9 and row.num_text_tokens == 63 and row.num_image_tokens == 144
    assert row.answer_types == {"point": 9} and sum(row.answers.values()) == 9 and row.sides == {0: 9}
    assert counts[("test", "vqa", "images", 3)].num_images == 6
    console = Console(file=io.StringIO(), width=200)
    print_stats(folder, console)
    text = console.file.getvalue()
    assert "grounding" in text and "majority" in text and "4 shards, 0 damaged" in text and "tokens" not in text
    console = Console(file=io.StringIO(), width=200)
    print_stats(str(folder / "train" / "text-*.tar"), console, count_tokens=lambda sample: (7, 0))
    assert "text tokens" in console.file.getvalue() and "28" in console.file.getvalue()


def test_damage_is_listed(folder):
    path = folder / "train" / "grounding-point-level0-000000.tar"
    path.write_bytes(path.read_bytes()[:6000])
    console = Console(file=io.StringIO(), width=300)
    print_stats(folder, console)
    assert "damaged: " in console.file.getvalue() and "truncated" in console.file.getvalue()
    contact_sheet(path, folder / "c.png")


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        contact_sheet(folder / "train" / "text-sums-level0-000000.tar", folder / "x.png", num=0)
    with pytest.raises(ValueError, match="no shards match"):
        print_stats(folder / "nothing-*.tar", Console(file=io.StringIO()))
