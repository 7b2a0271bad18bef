"""Requests that wait together are answered together: one queue, and workers that take from it what agrees.

A model in this process has one worker, because it can do one thing at a time; a model elsewhere may have many.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Generator as Pieces
from dataclasses import dataclass, field
from typing import TypeVar

from step3vl.types import Prompt, Sampling

from .backends import Backend, Said

T = TypeVar("T")


class Closing(Exception):
    """The server ends; the request is not answered."""


class Full(Exception):
    """Too many requests wait."""


@dataclass(slots=True, kw_only=True)
class Job:
    """A request on its way. `events` gets pieces of text, then the answers, or what went wrong."""

    model: str
    prompt: Prompt
    sampling: Sampling
    n: int = 1
    wants_pieces: bool = False
    events: queue.SimpleQueue[str | list[Said] | Exception] = field(default_factory=queue.SimpleQueue)
    abandoned: bool = False
    """Nobody waits for it any more."""
    settled: bool = False

    def settle(self, event: list[Said] | Exception) -> None:
        """The first end counts."""
        if not self.settled:
            self.settled = True
            self.events.put(event)


class Batcher:
    """Runs jobs.

    Args:
        backends: by model name.
        batch_size: sequences of one call; a job with more is a call of its own.
        num_workers: calls at once.
        wait_s: how long the first of a batch waits for others.
        max_waiting: jobs in the queue; a further one is refused.
        seeds_alone: jobs with a seed are calls of their own, so that their answers depend on nothing else.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        batch_size: int = 16,
        num_workers: int = 1,
        wait_s: float = 0.02,
        max_waiting: int = 1024,
        seeds_alone: bool = False,
    ):
        self.backends, self.batch_size, self.wait_s = backends, batch_size, wait_s
        self.max_waiting, self.seeds_alone = max_waiting, seeds_alone
        self.num_calls = self.num_abandoned = 0
        self._waiting: list[Job] = []
        self._running: set[int] = set()
        self._jobs: dict[int, Job] = {}
        self._change = threading.Condition()
        self._closing = self._held = False
        self.workers = [
            threading.Thread(target=self._work, daemon=True, name=f"answers-{k}") for k in range(num_workers)
        ]
        for worker in self.workers:
            worker.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises Closing, or Full."""
        with self._change:
            if self._closing:
                raise Closing
            if len(self._waiting) >= self.max_waiting:
                raise Full
            self._waiting.append(job)
            self._change.notify_all()
        return job

    def close(self) -> None:
        """Every job that has no answer yet, waiting or running, ends with Closing; workers end after their call."""
        with self._change:
            self._closing = True
            for job in [*self._waiting, *self._jobs.values()]:
                job.settle(Closing())
            self._waiting.clear()
            self._change.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Whether all workers have ended within that time."""
        deadline = time.monotonic() + timeout_s
        for worker in self.workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return not any(worker.is_alive() for worker in self.workers)

    def alone(self, action: Callable[[], T]) -> T:
        """Run `action` while no call to a model runs: those that run end first, and those that wait go on waiting.

        Raises Closing.
        """
        with self._change:
            self._change.wait_for(lambda: self._closing or not self._held)
            if self._closing:
                raise Closing
            self._held = True
            self._change.wait_for(lambda: not self._running)
        try:
            return action()
        finally:
            with self._change:
                self._held = False
                self._change.notify_all()

    # ------------------------------------------------------------------------------------------------ inside

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            try:
                self._answer(jobs)
            except Exception as error:  # a mistake of ours: the clients are told, and the next ones are served
                for job in jobs:
                    job.settle(error)
            finally:
                with self._change:
                    for job in jobs:
                        self._running.discard(id(job))
                        self._jobs.pop(id(job), None)
                    self._change.notify_all()

    def _take(self) -> list[Job] | None:
        """The oldest job and those that agree with it; None at the end."""
        with self._change:
            while (self._held or not self._waiting) and not self._closing:
                self._change.wait()
            first = self._waiting[0] if self._waiting else None
            if first is not None and self._most(first) > 1:
                deadline = time.monotonic() + self.wait_s
                while (left := deadline - time.monotonic()) > 0 and not self._closing:
                    self._change.wait(left)
            if self._closing:
                return None
            if self._held:
                return []
            self.num_abandoned += sum(job.abandoned for job in self._waiting)
            self._waiting = [job for job in self._waiting if not job.abandoned]
            if not self._waiting:
                return []
            first = self._waiting[0]
            jobs = [job for job in self._waiting if job is first or self._agree(first, job)][: self._most(first)]
            chosen = set(map(id, jobs))
            self._waiting = [job for job in self._waiting if id(job) not in chosen]
            self._running |= chosen
            self._jobs |= {id(job): job for job in jobs}
            return jobs

    def _most(self, job: Job) -> int:
        return max(1, self.batch_size // (job.n * self.backends[job.model].width))

    def _agree(self, one: Job, other: Job) -> bool:
        alone = self.seeds_alone and one.sampling.seed is not None
        return not alone and (one.model, one.sampling, one.n) == (other.model, other.sampling, other.n)

    def _answer(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        backend, first = self.backends[jobs[0].model], jobs[0]
        self.num_calls += 1
        if len(jobs) == 1 and first.wants_pieces and first.n == 1 and not self._waiting:
            pieces = backend.stream(first.prompt, first.sampling)
            if pieces is not None:
                return self._stream(first, pieces)
        try:
            groups = backend.answer([job.prompt for job in jobs], first.sampling, first.n)
        except Exception as error:
            if len(jobs) == 1:
                return first.settle(error)
            for job in jobs:  # one of them is at fault, and the others are not to suffer
                self._answer([job])
            return None
        for job, said in zip(jobs, groups, strict=True):
            job.settle(said)
        return None

    def _stream(self, job: Job, pieces: Pieces[str | Said, None, None]) -> None:
        try:
            for event in pieces:
                if job.abandoned or job.settled:
                    break
                if isinstance(event, str):
                    job.events.put(event)
                else:
                    job.settle([event])
        except Exception as error:
            job.settle(error)
        finally:
            pieces.close()
