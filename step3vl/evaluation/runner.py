"""Ask a model, with and without its eyes, and score what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from step3vl.types import Completion, Generator, Prompt, Sampling

from .benchmark import Benchmark, Case
from .extract import coordinates, final_text, last_number, option_letter

MASK_COLOUR = (128, 128, 128)  # mid grey carries no information about the image


@dataclass(slots=True, kw_only=True)
class Record:
    """One answered case.

    Example: Record(benchmark="reading", id="test-000012", answer="471", said="471", said_blind="20", score=1.0, ...)
    """

    benchmark: str
    id: str
    question: str
    answer: str
    said: str
    said_blind: str
    score: float
    blind_score: float | None
    """None: not asked blind, or without an image to mask."""
    truncated: bool
    unreadable: bool


def mask_images(prompt: Prompt) -> Prompt:
    """The same prompt with every image replaced by plain grey of the same size: what a model answers blind."""
    blind = [Image.new("RGB", image.size, MASK_COLOUR) for image in prompt.images]
    return Prompt(messages=prompt.messages, images=blind)


def measure(
    name: str,
    benchmark: Benchmark,
    cases: Sequence[Case],
    generator: Generator,
    sampling: Sampling,
    blind: bool = True,
) -> list[Record]:
    """Answer each case seeing and, unless switched off or without an image, blind. One record a case, in order."""
    seen = [group[0] for group in generator.generate([case.prompt for case in cases], sampling)]
    unseen: list[Completion | None] = [None] * len(cases)
    if blind:
        with_images = [k for k, case in enumerate(cases) if case.prompt.images]
        masked = [mask_images(cases[k].prompt) for k in with_images]
        for k, group in zip(with_images, generator.generate(masked, sampling) if masked else []):
            unseen[k] = group[0]
    return [
        Record(
            benchmark=name,
            id=case.id,
            question=case.prompt.messages[-1].content,
            answer=case.answer,
            said=completion.text,
            said_blind=without.text if without else "",
            score=benchmark.score(case, completion.text),
            blind_score=benchmark.score(case, without.text) if without else None,
            truncated=completion.truncated,
            unreadable=_unreadable(case.answer_type, completion.text),
        )
        for case, completion, without in zip(cases, seen, unseen)
    ]


def _unreadable(answer_type: str, text: str) -> bool:
    match answer_type:
        case "letter":
            return option_letter(text) is None
        case "number":
            return last_number(text) is None
        case "point":
            return coordinates(text, 2) is None
        case "box":
            return coordinates(text, 4) is None
    return not final_text(text)
