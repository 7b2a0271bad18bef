"""A benchmark is a list of cases and a way to score one answer. The prompt is sent to a model; the gold never is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from step3vl.data.shards import ShardReader, find_shards
from step3vl.types import Prompt, Region, Sample

from .scorers import score_answer


@dataclass(slots=True, kw_only=True)
class Case:
    """One question. `prompt` is all that a model sees; `answer`, `answer_type` and `regions` stay with the scorer."""

    id: str
    prompt: Prompt
    answer: str
    answer_type: str
    regions: list[Region] = field(default_factory=list)

    @classmethod
    def from_sample(cls, sample: Sample) -> Case:
        if sample.answer is None or sample.answer_type is None:
            raise ValueError(f"{sample.id}: has no checkable answer, so it cannot be a case")
        prompt = Prompt(messages=sample.conversation, images=sample.images)
        return cls(
            id=sample.id, prompt=prompt, answer=sample.answer, answer_type=sample.answer_type, regions=sample.regions
        )


class Benchmark(ABC):
    """Cases and their scoring."""

    @abstractmethod
    def cases(self, limit: int | None = None) -> list[Case]:
        """The first `limit` cases, or all, in a fixed order."""

    def score(self, case: Case, text: str) -> float:
        """0 to 1 for a model's answer."""
        return score_answer(text, case)


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
