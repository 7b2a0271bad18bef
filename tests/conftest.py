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
    "code/shapes": 4,
    "text/sums": 4,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Folder of a corpus with a few samples of every level-0 subset."""
    from step3vl.data.corpus.make import make_corpus

    out = tmp_path_factory.mktemp("data") / "corpus"
    splits = {split: {name: {0: num} for name, num in LEVEL0.items()} for split in ("train", "val", "test")}
    make_corpus(out, {"turns": 6, "samples_per_shard": 10, "splits": splits}, seed=0, num_processes=1)
    return out


@pytest.fixture
def workplace(tmp_path, monkeypatch, small_corpus):
    """An empty checkout with experiments, ablations and the small corpus, as the current folder."""
    for name in ("experiments", "ablations"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "corpus").symlink_to(small_corpus)
    monkeypatch.chdir(tmp_path)
    return tmp_path
