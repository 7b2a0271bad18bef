"""Pools of messages: many answers of one model to each problem, kept once, from which synthesis is trained.

PaCoRe trains on 16 to 24 of 24 cached messages a problem (arXiv 2601.05593, section 3.2); the problems are those whose
messages are right now and then. A pool is JSON lines, one problem a line, and is added to until it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from step3vl.data.shards import ShardReader, find_shards
from step3vl.evaluation import Benchmark, Case, HeldOut
from step3vl.evaluation.answers import prompt_hash
from step3vl.types import Completion, Generator, Message, Prompt, Sampling

from .messages import compact

FORMAT = 1
NUM_MESSAGES = 24
MATH_BAND = (0.0, 9 / 24)
CODE_BAND = (0.0, 15 / 24)
"""Stage 1 of the paper keeps problems whose mean message accuracy is above the first and below the second."""


@dataclass(slots=True, kw_only=True)
class PooledMessage:
    """What an answer concluded."""

    text: str
    """Without its thoughts."""
    score: float | None
    """Of the whole answer, by the benchmark's scorer; None: not scored."""
    num_tokens: int = 0
    """Of the whole answer."""
    truncated: bool = False


@dataclass(slots=True, kw_only=True)
class PooledProblem:
    """One line of a pool."""

    id: str
    source: dict[str, str]
    """Where the problem with its images is: {"shard", "key"}, or {"benchmark"} for a benchmark's case of this id."""
    conversation: list[list[str]]
    """[role, content] of each turn, as asked."""
    prompt: str
    """Hash of the conversation and of its pixels."""
    num_images: int
    answer: str
    answer_type: str
    messages: list[PooledMessage] = field(default_factory=list)
    num_failed: int = 0
    """Answers that never came; the pool of this problem is smaller by as many."""
    model: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def accuracy(self) -> float | None:
        """Mean score of the messages; None where one was not scored, or there is none."""
        scores = [message.score for message in self.messages if message.score is not None]
        return sum(scores) / len(scores) if scores and len(scores) == len(self.messages) else None


class Cases:
    """A source of problems: cases with the place where each can be found again."""

    def __init__(self, benchmark: Benchmark, places: Iterator[tuple[Case, dict[str, str]]]):
        self.benchmark, self.places = benchmark, places

    @classmethod
    def of_shards(cls, pattern: str, limit: int | None = None) -> Cases:
        """Samples of shards that have a checkable answer."""

        def read() -> Iterator[tuple[Case, dict[str, str]]]:
            num = 0
            for path in find_shards(pattern):
                reader = ShardReader(path)
                for i in range(len(reader)):
                    if limit is not None and num >= limit:
                        return
                    if reader.row(i).get("answer") is not None:
                        num += 1
                        yield Case.from_sample(reader.read(i)), {"shard": str(path), "key": reader.key(i)}

        return cls(HeldOut(pattern), read())

    @classmethod
    def of_benchmark(cls, name: str, benchmark: Benchmark, limit: int | None = None) -> Cases:
        """A benchmark's cases; of such a pool no model that is measured by it should be trained."""
        return cls(benchmark, ((case, {"benchmark": name}) for case in benchmark.stream(limit)))


@dataclass(slots=True, kw_only=True)
class Built:
    """What became of a call of `build_pool`."""

    num_problems: int = 0
    """Lines of the pool that belong to this source."""
    num_new: int = 0
    num_failed: int = 0
    """Answers that never came, in the new lines."""
    num_without_any: int = 0
    """Problems none of whose answers came: they have no line, and are asked again by the same call."""


def build_pool(
    file: str | Path,
    cases: Cases,
    generator: Generator,
    sampling: Sampling,
    model: str,
    num_messages: int = NUM_MESSAGES,
    cases_per_call: int = 4,
    done: Callable[[int], None] = lambda num: None,
) -> Built:
    """Add to a pool what it lacks of these cases. Going on after an interruption gives what one call gives.

    Args:
        file: the pool, made when missing; a torn last line is asked again.
        cases: the problems.
        generator, sampling: who answers, and how; the seed of each call of the generator follows from its number.
        model: names the model's weights; it stands in every line.
        num_messages: answers a problem.
        cases_per_call: problems that are asked together; the same at every call for the same file.
        done: told after each call how many problems there are.

    Raises:
        ValueError: num_messages is below 1, or the pool holds answers of another model or sampling.
    """
    if num_messages < 1:
        raise ValueError(f"num_messages is {num_messages}; accepted is 1 or more")
    file = Path(file)
    told = asdict(sampling) | {"stop": list(sampling.stop)}
    have = {(problem.id, problem.prompt): problem for problem in read_pool(file)} if file.is_file() else {}
    for problem in have.values():
        if (problem.model, problem.sampling) != (model, told):
            raise ValueError(
                f"{file} holds answers of model {problem.model!r} with sampling {problem.sampling}; this is {model!r} "
                f"with {told}: give another file"
            )
    built = Built()
    for call, found in enumerate(iter(lambda: list(islice(cases.places, cases_per_call)), [])):
        hashes = [prompt_hash(case.prompt) for case, _ in found]
        keys = [(case.id, hashed) for (case, _), hashed in zip(found, hashes)]
        if not all(key in have for key in keys):
            seeded = replace(sampling, seed=None if sampling.seed is None else sampling.seed + call)
            said = generator.generate([case.prompt for case, _ in found], seeded, num_messages)
            scored = _scored(cases.benchmark, [case for case, _ in found], said)
            for key, (case, place), hashed, messages in zip(keys, found, hashes, scored):
                if key in have:
                    continue
                if not messages:
                    built.num_without_any += 1
                    built.num_failed += num_messages
                    continue
                problem = PooledProblem(
                    id=case.id,
                    source=place,
                    conversation=[[message.role, message.content] for message in case.prompt.messages],
                    prompt=hashed,
                    num_images=len(case.prompt.images),
                    answer=case.answer,
                    answer_type=case.answer_type,
                    messages=messages,
                    num_failed=num_messages - len(messages),
                    model=model,
                    sampling=told,
                )
                append(file, problem)
                built.num_new += 1
                built.num_failed += problem.num_failed
        built.num_problems += len(found)
        done(built.num_problems)
    built.num_problems -= built.num_without_any
    return built


def _scored(
    benchmark: Benchmark, cases: Sequence[Case], said: Sequence[Sequence[Completion]]
) -> list[list[PooledMessage]]:
    came = [[completion for completion in group if completion.error is None] for group in said]
    scores = iter(benchmark.scores([(case, c.text) for case, group in zip(cases, came) for c in group]))
    return [
        [
            PooledMessage(text=compact(c.text), score=next(scores), num_tokens=c.num_tokens, truncated=c.truncated)
            for c in group
        ]
        for group in came
    ]


# ------------------------------------------------------------------------------------------------ the file


def append(file: Path, problem: PooledProblem) -> None:
    """Add a line; what a torn line left open is closed first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write((json.dumps(asdict(problem)) + "\n").encode())


def read_pool(file: str | Path) -> Iterator[PooledProblem]:
    """The problems of a pool. A line that is not JSON was torn by the end of a process, and is asked again.

    Raises ValueError for a file that is missing, and for a line that is JSON but no problem.
    """
    if not Path(file).is_file():
        raise ValueError(f"there is no pool {file}")
    with Path(file).open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            try:
                yield PooledProblem(**{**row, "messages": [PooledMessage(**m) for m in row["messages"]]})
            except (TypeError, KeyError) as error:
                raise ValueError(f"{file}, line {number}: not a problem of a pool ({error})") from None


def prompt_of(problem: PooledProblem, images: Sequence[Any] = ()) -> Prompt:
    """The problem as it was asked; its images come from its source. Raises ValueError for another number of them."""
    if len(images) != problem.num_images:
        raise ValueError(f"{problem.id}: {len(images)} images for a problem with {problem.num_images}")
    turns = [Message(role=role, content=content) for role, content in problem.conversation]  # type: ignore[arg-type]
    return Prompt(messages=turns, images=list(images))


# ------------------------------------------------------------------------------------------------ which to train on


def in_band(problems: Iterable[PooledProblem], low: float, high: float) -> Iterator[PooledProblem]:
    """Problems whose mean message accuracy is strictly between `low` and `high`.

    Stage 1 of the paper takes the pool's own accuracy, `MATH_BAND` or `CODE_BAND`; stage 2 takes (0, 1) of a
    checkpoint's synthesis, for which a pool of that checkpoint's answers is built.
    Raises ValueError for an empty band, and for a problem that was not scored.
    """
    if not low < high:
        raise ValueError(f"the band from {low} to {high} is empty")
    for problem in problems:
        if problem.accuracy is None:
            raise ValueError(f"{problem.id} has messages without a score, so that no band holds it")
        if low < problem.accuracy < high:
            yield problem


def fraction(text: str) -> float:
    """'9/24' or '0.375'. Raises ValueError with a sentence for anything else."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is no share; accepted are 0.375 and 9/24") from None
