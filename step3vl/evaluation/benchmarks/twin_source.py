"""What twins are made from: held-out samples of the generated corpus, their questions, options, places and images."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from step3vl.data.shards import ShardReader, find_shards
from step3vl.types import IMAGE_MARK, Sample

from .hub import letters


class Corpus:
    """Held-out samples of the generated corpus by subset, in a fixed order."""

    def __init__(self, root: Path):
        self.root = root

    def samples(self, subset: str, num: int) -> list[Sample]:
        """The first samples of a subset, e.g. "vqa-choice-level2"; again from the first when there are too few."""
        files = find_shards(str(self.root / "test" / f"{subset}-*.tar"))
        readers = [ShardReader(file) for file in files]
        places = [(reader, i) for reader in readers for i in range(len(reader))]
        if not places:
            raise ValueError(f"{self.root} has no test samples {subset}; make it with step3vl data make")
        return [reader.read(i) for reader, i in (places[n % len(places)] for n in range(num))]


def png(image: Image.Image) -> dict[str, Any]:
    """An image as `datasets` stores it in parquet."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "image.png"}


def words_of(sample: Sample) -> str:
    """The question without image marks."""
    return sample.conversation[-1].content.replace(IMAGE_MARK, "").strip()


def options_of(sample: Sample) -> tuple[str, list[str]]:
    """Question and options of a multiple-choice sample."""
    question, *lines = words_of(sample).split("\n")
    return question, [re.sub(r"^[A-Z]\. ", "", line) for line in lines]


def four_of(sample: Sample, others: Sequence[Sample], rng: random.Random) -> tuple[list[str], str]:
    """Four options, the right one among them, and its letter."""
    wrong = sorted({str(other.answer) for other in others} - {str(sample.answer)})
    options = [str(sample.answer), *rng.sample(wrong, 3)]
    rng.shuffle(options)
    return options, letters(4)[options.index(str(sample.answer))]


def choice_rows(subset: str) -> Callable[[Corpus, int], list[tuple[Sample, str, list[str]]]]:
    def make(corpus: Corpus, num: int) -> list[tuple[Sample, str, list[str]]]:
        return [(sample, *options_of(sample)) for sample in corpus.samples(subset, num)]

    return make


def placed(corpus: Corpus, subset: str, num: int) -> list[tuple[Sample, tuple[float, float, float, float]]]:
    """Samples whose answer is a place, with its box in pixels."""
    found = [
        (sample, region.box)
        for sample in corpus.samples(subset, 3 * num)
        for region in sample.regions
        if region.label == "answer" and region.image == 0
    ]
    return found[:num]
