"""A benchmark is a list of cases and a way to score one answer. The prompt is sent to a model; the gold never is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from step3vl.data.shards import ShardReader, find_shards
from step3vl.types import Prompt, Region, Sample

from .extract import coordinates, final_text, last_number, option_letter
from .scorers import score_answer

if TYPE_CHECKING:
    from .runner import Record


@dataclass(slots=True, kw_only=True)
class Case:
    """One question. `prompt` is all that a model sees; everything else stays with the scorer."""

    id: str
    prompt: Prompt
    answer: str
    answer_type: str
    regions: list[Region] = field(default_factory=list)
    group: str = ""
    """Category, subject or kind that scores are broken down by."""
    gold: dict[str, Any] = field(default_factory=dict)
    """What else scoring needs: options, accepted answers, areas, tests."""

    @classmethod
    def from_sample(cls, sample: Sample) -> Case:
        if sample.answer is None or sample.answer_type is None:
            raise ValueError(f"{sample.id}: has no checkable answer, so it cannot be a case")
        prompt = Prompt(messages=sample.conversation, images=sample.images)
        return cls(
            id=sample.id, prompt=prompt, answer=sample.answer, answer_type=sample.answer_type, regions=sample.regions
        )

    def without_images(self) -> Case:
        """The same case for scoring alone; `gold` remembers the sizes of its images."""
        sizes = {"image_sizes": [image.size for image in self.prompt.images]} if self.prompt.images else {}
        return replace(self, prompt=Prompt(messages=self.prompt.messages), gold=self.gold | sizes)


class Benchmark(ABC):
    """Cases and their scoring."""

    @abstractmethod
    def cases(self, limit: int | None = None) -> list[Case]:
        """The first `limit` cases, or all, in a fixed order."""

    def stream(self, limit: int | None = None) -> Iterator[Case]:
        """The same cases one by one, for benchmarks whose images do not fit into memory at once."""
        return iter(self.cases(limit))

    def score(self, case: Case, text: str) -> float:
        """0 to 1 for a model's answer."""
        return score_answer(text, case)

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        """Scores of many answers; where judging is slow, in parallel."""
        return [self.score(case, text) for case, text in pairs]

    def is_readable(self, case: Case, text: str) -> bool:
        """Whether the answer holds something of the expected form, right or wrong."""
        match case.answer_type:
            case "letter":
                return option_letter(text) is not None
            case "number":
                return last_number(text) is not None
            case "point":
                return coordinates(text, 2) is not None
            case "box":
                return coordinates(text, 4) is not None
        return bool(final_text(text))

    def vote(self, case: Case, text: str) -> str:
        """What answers that mean the same have in common: the majority of several samples is counted by it."""
        match case.answer_type:
            case "letter":
                return option_letter(text) or ""
            case "number":
                number = last_number(text)
                return "" if number is None else repr(number)
            case "point" | "box":
                return str(coordinates(text, 2 if case.answer_type == "point" else 4))
        return " ".join(final_text(text).casefold().split())

    def headline(self, records: Sequence[Record]) -> float:
        """The benchmark's own number from the scores of its cases: their mean, unless it is defined otherwise."""
        return float(np.mean([record.score for record in records]))

    def breakdown(self, records: Sequence[Record]) -> dict[str, float]:
        """Mean score by group, where there are groups."""
        groups: dict[str, list[float]] = {}
        for record in records:
            groups.setdefault(record.group, []).append(record.score)
        return {name: float(np.mean(scores)) for name, scores in sorted(groups.items())} if len(groups) > 1 else {}


class HeldOut(Benchmark):
    """Samples of shards that training never saw.

    Args:
        shards: pattern of the shards, e.g. corpus/test/documents-digits-level0-*.tar.
        num_cases: use the first `num_cases`; None: all.
    """

    def __init__(self, shards: str, num_cases: int | None = None):
        self.shards, self.num_cases = shards, num_cases

    def cases(self, limit: int | None = None) -> list[Case]:
        bounds = [n for n in (limit, self.num_cases) if n is not None]
        readers = [ShardReader(path) for path in find_shards(self.shards)]
        picks = [(reader, i) for reader in readers for i in range(len(reader))]
        return [Case.from_sample(reader.read(i)) for reader, i in picks[: min(bounds, default=len(picks))]]
