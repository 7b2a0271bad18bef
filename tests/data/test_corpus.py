"""The generated corpus: every subset makes whole samples; the same bytes whatever the number of processes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from step3vl.data.corpus.draw import CELL
from step3vl.data.corpus.make import DOMAINS, Manifest, draw_samples, make_corpus
from step3vl.data.schema import from_json, to_json
from step3vl.data.shards import ShardReader, find_shards
from step3vl.types import IMAGE_MARK
from tests.data.drawn import draw, questions

ALL = [(d, s, level) for d, subsets in DOMAINS.items() for s, subset in subsets.items() for level in subset.levels]
QUIET = Console(file=io.StringIO())


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
