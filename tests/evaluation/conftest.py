"""Twins of all benchmarks, made once a session."""

import pytest

from step3vl.evaluation.benchmarks.twins import write_twins

from .answering import NUM

SUBSETS = {
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


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Twins of all benchmarks from a corpus of twenty samples a subset."""
    from step3vl.data.corpus.make import make_corpus

    folder = tmp_path_factory.mktemp("twins")
    few = {name: dict.fromkeys(levels, 20) for name, levels in SUBSETS.items()}
    recipe = {"turns": 6, "samples_per_shard": 50, "splits": {"test": few}}
    make_corpus(folder / "corpus", recipe, seed=0, num_processes=1)
    write_twins(folder / "corpus", folder / "data", NUM)
    return folder / "data"
