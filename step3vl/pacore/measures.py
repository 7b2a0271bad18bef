"""What coordination was worth, and what it cost, as traces tell it.

Emergent correctness and cross-checking words are those of arXiv 2601.05593, figure 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from step3vl.evaluation import Benchmark, Case

from .trace import Trace, read_traces

RIGHT = 0.5
"""Score from which an answer counts as right, where scores are not only 0 and 1 (boxes)."""
CROSS_CHECK = re.compile(r"reference|参考|\bref\.? ?\d", re.IGNORECASE)
TRACES_AT_ONCE = 64


def cross_checks(text: str) -> int:
    """How often an answer refers to the messages it was shown: 'reference', '参考', 'ref 3'."""
    return len(CROSS_CHECK.findall(text))


@dataclass(slots=True, kw_only=True)
class Coordination:
    """What the rounds of some questions did. Every mean is over questions."""

    num_questions: int = 0
    final: float = 0.0
    """Score of the final answers."""
    messages: float = 0.0
    """Score of the answers that the last round was shown, failed ones left out: what one such answer is worth."""
    covered: float = 0.0
    """Some of these was right; above `final` lies what synthesis has lost."""
    num_all_wrong: int = 0
    """Questions all of whose messages were wrong."""
    emergent: float | None = None
    """Share of those that ended right: no vote could have. None: there were none."""
    num_all_right: int = 0
    kept: float | None = None
    """Share of the questions with right messages alone that ended right; below 1, synthesis spoils answers."""
    cross_checks: float = 0.0
    """Cross-checking words a final answer, thoughts included."""
    num_tokens: float = 0.0
    """Generated for a question in all rounds."""
    num_final_tokens: float = 0.0
    """Of these, the final answer's."""
    num_prompt_tokens: float | None = None
    """Sent for a question, each round's prompt once. An estimate where `counted_exactly` is false."""
    counted_exactly: bool = True
    seconds: float = 0.0
    """From the first round's call to the last one's end; calls ask several questions at once."""
    num_failed: int = 0
    """Answers that never came, over all questions."""
    num_dropped: int = 0
    """Messages that did not fit the context, over all questions."""
    num_without_final: int = 0
    """Questions whose last answer failed; they are in no mean of scores."""


class Tally:
    """Adds questions up to a Coordination; keeps numbers and no text."""

    def __init__(self) -> None:
        self.found = Coordination()
        self.finals: list[float] = []
        self.shown: list[Sequence[float]] = []
        self.costs: list[list[float]] = []

    def add(self, trace: Trace, shown: Sequence[float], final: float) -> None:
        """A question: scores of the answers that the last round was shown (failed ones left out) and of the last."""
        self.found.num_questions += 1
        self.found.num_failed += trace.num_failed
        self.found.num_dropped += trace.num_dropped
        self.found.counted_exactly &= trace.counted_exactly
        prompts = float("nan") if trace.num_prompt_tokens is None else float(trace.num_prompt_tokens)
        words = cross_checks(trace.final.text)
        self.costs.append([trace.num_tokens, trace.final.num_tokens, trace.seconds, words, prompts])
        if trace.final.error is not None:
            self.found.num_without_final += 1
            return
        self.finals.append(final)
        self.shown.append(shown)

    def result(self) -> Coordination:
        """Everything so far."""
        found, pairs = self.found, list(zip(self.finals, self.shown))
        if self.costs:
            tokens, final_tokens, seconds, words, prompts = np.mean(np.asarray(self.costs, dtype=np.float64), axis=0)
            found.num_tokens, found.num_final_tokens, found.seconds = float(tokens), float(final_tokens), float(seconds)
            found.cross_checks = float(words)
            found.num_prompt_tokens = None if np.isnan(prompts) else float(prompts)
        if pairs:
            found.final = float(np.mean(self.finals))
            found.messages = float(np.mean([np.mean(own) if own else 0.0 for own in self.shown]))
            found.covered = float(np.mean([max(own, default=0.0) for own in self.shown]))
        wrong = [final >= RIGHT for final, own in pairs if own and max(own) < RIGHT]
        right = [final >= RIGHT for final, own in pairs if own and min(own) >= RIGHT]
        found.num_all_wrong, found.num_all_right = len(wrong), len(right)
        found.emergent = float(np.mean(wrong)) if wrong else None
        found.kept = float(np.mean(right)) if right else None
        return found


def coordination(pairs: Iterator[tuple[Case, Trace]], benchmark: Benchmark) -> Coordination:
    """Measures of traces whose questions are the benchmark's cases."""
    tally = Tally()
    while block := list(islice(pairs, TRACES_AT_ONCE)):
        asked = [(case, text) for case, trace in block for text in [*_shown(trace), trace.final.text]]
        scores = iter(benchmark.scores(asked))
        for _, trace in block:
            tally.add(trace, [next(scores) for _ in _shown(trace)], next(scores))
    return tally.result()


def _shown(trace: Trace) -> list[str]:
    answers = trace.rounds[-2].answers if len(trace.rounds) > 1 else []
    return [answer.text for answer in answers if answer.error is None]


def find_cases(file: str | Path, cases: Mapping[str, Case]) -> Iterator[tuple[Case, Trace]]:
    """Traces of known questions, by hash of the prompt; of a question that was run again, each sample's last trace.

    What belongs to no case (questions asked blind) and torn lines are passed over. The file is read twice, so that no
    more than one trace is in memory.
    """
    latest: dict[tuple[str, int], int] = {}
    for number, trace in enumerate(read_traces(file)):
        if trace is not None and trace.id in cases:
            latest[trace.id, trace.sample] = number
    for number, trace in enumerate(read_traces(file)):
        if trace is not None and latest.get((trace.id, trace.sample)) == number:
            yield cases[trace.id], trace
