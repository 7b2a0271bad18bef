"""Synthesis prompts for reinforcement learning, from pools: problems in a band, each with some of its cached messages.

PaCoRe draws 16 to 24 of 24 messages a problem anew at every visit (arXiv 2601.05593, section 3.2). What a draw holds
follows from the seed and the draw's number alone, so that a resumed run sees what one run sees.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from step3vl.data.mixture import Draw, Mixture, Source
from step3vl.data.processor import Processor
from step3vl.data.prompts import PromptBatches, PromptData, Rephrased
from step3vl.data.shards import ShardReader
from step3vl.data.shuffle import mix
from step3vl.evaluation.answers import prompt_hash
from step3vl.types import Completion, Message, Sample

from .budget import exact, fit
from .messages import passed_on
from .pool import PooledMessage, PooledProblem, fraction, in_band, prompt_of, read_pool
from .template import SynthesisTemplate


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSource:
    """One pool of a mixture, and the band of its problems that are asked."""

    pool: str
    """The pool's file, relative to the folder of pools."""
    shards: str | None = None
    """Problems that the pool is made of: a glob or a folder, relative to the data root. Null: the pool is there."""
    num_problems: int | None = None
    """Only the first so many of these; null: all."""
    weight: float = 1.0
    """How much of the mixture this pool is, relative to the other weights."""
    low: str = "0"
    high: str = "1"
    """A problem's mean message accuracy lies between these, both ends left out: "0.375" or "9/24"."""
    max_epochs: float | None = None
    """A run that would show these problems more often is refused before its first step; null: no limit."""


@dataclass(slots=True, kw_only=True)
class Synthesis(Rephrased):
    """A problem with some messages about it. Its own conversation, its answer and its images are the problem's."""

    shown: list[PooledMessage] = field(default_factory=list)
    """The messages in the prompt, in their order."""
    num_dropped: int = 0
    """Drawn messages that did not fit."""


class PoolMixture(Mixture):
    """Weighted pools in an endless order that `seed` fixes.

    Args:
        folder: where the pools are.
        pools: what is mixed, by name.
        seed: order of the problems.

    Raises ValueError for a pool that is missing, or holds no problem in its band.
    """

    def __init__(self, folder: str | Path, pools: Mapping[str, PoolSource], seed: int = 0):
        self.pools = dict(pools)
        self.problems: dict[str, list[PooledProblem]] = {}
        sources = {
            name: Source(shards=pool.pool, weight=pool.weight, max_epochs=pool.max_epochs)
            for name, pool in self.pools.items()
        }
        super().__init__(folder, sources, seed)

    def problem(self, draw: Draw) -> PooledProblem:
        """The problem that is drawn."""
        return self.problems[draw[0]][self._place(draw)]

    def _survey(self, name: str, source: Source) -> tuple[list[Path], list[int]]:
        pool, file = self.pools[name], self.root / source.shards
        try:
            problems = list(read_pool(file))
            kept = list(in_band(problems, fraction(pool.low), fraction(pool.high)))
        except ValueError as error:
            raise ValueError(f"sources.{name}: {error}") from error
        if not kept:
            raise ValueError(
                f"sources.{name}: none of the {len(problems)} problems in {file} has a mean message accuracy between "
                f"{pool.low} and {pool.high}"
            )
        self.problems[name] = kept
        return [file], [len(kept)]


class PoolBatches(PromptBatches):
    """`batches[step]` holds the synthesis prompts of a planned step."""

    def __init__(
        self,
        mixture: PoolMixture,
        processor: Processor,
        max_tokens: int,
        template: SynthesisTemplate,
        least: int,
        most: int,
    ):
        super().__init__(mixture, processor, max_tokens)
        self.pools, self.template, self.least, self.most = mixture, template, least, most
        self.counter = exact(processor)
        self._readers: dict[str, tuple[ShardReader, dict[str, int]]] = {}

    def read(self, draw: Draw) -> Synthesis:
        """The problem of a draw with the messages of that draw, always the same."""
        problem = self.pools.problem(draw)
        if len(problem.messages) < self.least:
            raise ValueError(f"has {len(problem.messages)} messages and data.least_messages is {self.least}")
        sample = self._sample(problem)
        original = prompt_of(problem, sample.images)
        drawn = self._drawn(problem, draw)
        texts = [message.text for message in drawn]

        def num_tokens(some: object) -> int:
            return self.counter.count(self.template.prompt(original, list(some)))  # type: ignore[call-overload]

        kept = fit(texts, num_tokens, self.max_tokens)
        return Synthesis(
            id=sample.id,
            domain=sample.domain,
            subset=sample.subset,
            level=sample.level,
            messages=[*original.messages, Message(role="assistant", content=problem.answer)],
            images=sample.images,
            answer=problem.answer,
            answer_type=problem.answer_type,
            regions=sample.regions,
            source=sample.source,
            licence=sample.licence,
            asked=self.template.prompt(original, [texts[k] for k in kept]),
            shown=[drawn[k] for k in kept],
            num_dropped=len(drawn) - len(kept),
        )

    def name_of(self, draw: Draw) -> str:
        return self.pools.problem(draw).id

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_readers": {}}  # files are opened anew

    # ------------------------------------------------------------------------------------------------ inside

    def _drawn(self, problem: PooledProblem, draw: Draw) -> list[PooledMessage]:
        """The draw's messages, in the order in which inference would pass them on."""
        rng = random.Random(mix(self.mixture.seed, crc32(draw[0].encode()), draw[1]))
        num = min(rng.randint(self.least, self.most), len(problem.messages))
        messages = [problem.messages[k] for k in sorted(rng.sample(range(len(problem.messages)), num))]
        said = [Completion(text=message.text, token_ids=[], truncated=False) for message in messages]
        return [messages[k] for k in passed_on(said)]

    def _sample(self, problem: PooledProblem) -> Sample:
        """The problem's sample, from where the pool says it is."""
        if "shard" in problem.source:
            path, key = problem.source["shard"], problem.source["key"]
            if path not in self._readers:
                reader = ShardReader(path, strict=False)
                self._readers[path] = reader, {reader.key(i): i for i in range(len(reader))}
            reader, places = self._readers[path]
            if key not in places:
                raise ValueError(f"{path} has no sample {key} any more")
            sample = reader.read(places[key])
            if prompt_hash(prompt_of(problem, sample.images)) != problem.prompt:
                raise ValueError(f"{path}: the images of {key} are not those that the pool was made with")
            return sample
        if problem.num_images:
            where = ", ".join(f"{key} {value}" for key, value in problem.source.items())
            raise ValueError(f"its images are in {where}; only problems of shards can be trained on with images")
        return Sample(id=problem.id, domain="text", subset="pool", level=0, messages=[], answer=problem.answer)


class PoolData(PromptData):
    """Synthesis prompts from a weighted mixture of pools.

    Args:
        root: folder of the pools.
        sources: what is asked, by name: pool, weight, and the band of problems that are kept.
        prompts_per_step: prompts of one iteration on one rank.
        num_steps: iterations in one epoch of this module; more epochs go on in the mixture.
        max_prompt_tokens: the longest messages are dropped until a prompt fits; one that does not even so is left out.
        least_messages: fewest messages in a prompt; a problem with fewer is left out and reported.
        most_messages: most of them. The number is drawn evenly between the two.
        template: published, short, or a file of another synthesis template; null: the published one.
        num_workers: processes that read and check prompts.
        seed: order of the problems, and which messages each draw shows.
        max_skipped_share: most of the problems drawn, as a share, that may turn out unusable; with more the run stops.
    """

    def __init__(
        self,
        root: str,
        sources: dict[str, PoolSource],
        prompts_per_step: int,
        num_steps: int,
        max_prompt_tokens: int,
        least_messages: int = 16,
        most_messages: int = 24,
        template: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        max_skipped_share: float = 0.05,
    ):
        super().__init__(root, {}, prompts_per_step, num_steps, max_prompt_tokens, num_workers, seed, max_skipped_share)
        if not 1 <= least_messages <= most_messages:
            raise ValueError(
                f"least_messages is {least_messages} and most_messages {most_messages}; accepted are 1 <= least <= most"
            )
        self.pools, self.least_messages, self.most_messages = sources, least_messages, most_messages
        self.template = SynthesisTemplate(template)

    def make_mixture(self) -> PoolMixture:
        return PoolMixture(self.root, self.pools, self.seed)

    @property
    def batches(self) -> PoolBatches:
        if not isinstance(self.mixture, PoolMixture) or self.processor is None:
            raise RuntimeError("PoolData.connect(processor) and setup('fit') must be called before its loaders")
        return PoolBatches(
            self.mixture,
            self.processor,
            self.max_prompt_tokens,
            self.template,
            self.least_messages,
            self.most_messages,
        )
