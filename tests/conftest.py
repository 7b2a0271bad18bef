"""A small corpus, made once a session, and a folder to run commands in."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "140"  # tables of one width, whatever the terminal

import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LEVEL0 = {
    "documents/digits": 24,
    "documents/words": 8,
    "grounding/point": 8,
    "grounding/count": 8,
    "vqa/attributes": 8,
    "vqa/spatial": 8,
    "gui/click": 8,
    "education/sums": 8,
    "knowledge/photo": 4,
    "knowledge/flags": 8,
    "code/shapes": 4,
    "text/sums": 4,
}
"""Samples of each."""
TWIN_SUBSETS = {
    "documents/words": (2,),
    "documents/formula": (2,),
    "education/geometry": (2,),
    "education/calculus": (3,),
    "grounding/box": (2,),
    "grounding/count": (2,),
    "gui/click": (3, 4),
    "knowledge/cards": (2,),
    "knowledge/photo": (1, 2),
    "text/sums": (4,),
    "vqa/choice": (1, 2, 3),
    "vqa/compare": (1,),
    "vqa/images": (3, 4),
}
"""What twins of the published benchmarks are made from."""
NUM_TWINS = 12


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Folder of a corpus with a few samples of every level-0 subset."""
    from step3vl.data.corpus.make import make_corpus

    out = tmp_path_factory.mktemp("data") / "corpus"
    splits = {split: {name: {0: num} for name, num in LEVEL0.items()} for split in ("train", "val", "test")}
    for subsets in splits.values():
        subsets["knowledge/flags"][1] = 8
    make_corpus(out, {"turns": 6, "samples_per_shard": 10, "splits": splits}, seed=0, num_processes=1)
    return out


@pytest.fixture
def workplace(tmp_path, monkeypatch, small_corpus):
    """An empty checkout with experiments, ablations and the small corpus under both names, as the current folder."""
    for name in ("experiments", "ablations"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("corpus", "corpus-ablation"):
        (tmp_path / name).symlink_to(small_corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Twins of all benchmarks from a corpus of twenty samples a subset."""
    from step3vl.data.corpus.make import make_corpus
    from step3vl.evaluation.benchmarks.twins import write_twins

    folder = tmp_path_factory.mktemp("twins")
    few = {name: dict.fromkeys(levels, 20) for name, levels in TWIN_SUBSETS.items()}
    recipe = {"turns": 6, "samples_per_shard": 50, "splits": {"test": few}}
    make_corpus(folder / "corpus", recipe, seed=0, num_processes=1)
    write_twins(folder / "corpus", folder / "data", NUM_TWINS)
    return folder / "data"
