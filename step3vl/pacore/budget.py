"""How long a prompt is, and which messages go when it is too long.

A model's own processor counts exactly; of a model behind a server only an estimate is known, and it is said to be one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from step3vl.data.images import plan
from step3vl.data.processor import Processor
from step3vl.types import IMAGE_MARK, Message, MultiCrop, Prompt

CHARACTERS_A_TOKEN = 4
TOKENS_A_TURN = 5
"""Markup around a turn, in ChatML."""
TOKENS_A_CROP, TOKENS_A_GLOBAL_VIEW = 84, 171
"""STEP3-VL's, markers and newline included."""


@dataclass(frozen=True, slots=True)
class Counter:
    """Tokens of a prompt, without an answer."""

    count: Callable[[Prompt], int]
    is_exact: bool


def estimated() -> Counter:
    """Characters over four, and images as STEP3-VL counts them."""
    return Counter(_estimate, is_exact=False)


def exact(processor: Processor) -> Counter:
    """By the processor's own layout; pixels are not touched."""
    tails: dict[tuple[str, ...], int] = {}  # tokens that an empty answer has after the prompt, by the roles before it

    def measured(messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> int:
        return processor.measure([*messages, Message(role="assistant", content="")], sizes, "prompt").num_tokens

    def count(prompt: Prompt) -> int:
        roles = tuple(message.role for message in prompt.messages)
        if roles not in tails:
            plain = [Message(role=role, content="x") for role in roles]  # type: ignore[arg-type]
            alone = len(processor.encode_prompt(Prompt(messages=plain)).input_ids)
            tails[roles] = measured(plain, []) - alone
        return measured(prompt.messages, [image.size for image in prompt.images]) - tails[roles]

    return Counter(count, is_exact=True)


def _estimate(prompt: Prompt) -> int:
    num_tokens = TOKENS_A_TURN * (len(prompt.messages) + 1)
    for message in prompt.messages:
        num_tokens += math.ceil(len(message.content.replace(IMAGE_MARK, "")) / CHARACTERS_A_TOKEN)
    crops = [plan(*image.size, MultiCrop()).num_crops for image in prompt.images]
    return num_tokens + sum(TOKENS_A_GLOBAL_VIEW + TOKENS_A_CROP * num for num in crops)


def fit(texts: Sequence[str], num_tokens: Callable[[Sequence[str]], int], budget: int) -> list[int]:
    """Which texts stay, as places in order: the longest go, one by one, until `num_tokens` of the rest is in budget.

    Of equally long ones the last goes first. When nothing stays, the prompt without texts is the caller's to judge.
    """
    kept = list(range(len(texts)))
    while kept and num_tokens([texts[k] for k in kept]) > budget:
        kept.remove(max(kept, key=lambda k: (len(texts[k]), k)))
    return kept
