"""Problems with lists of messages that nobody said: a warm start for tiny models, which have never read a list.

Reinforcement learning cannot begin with a skill that is never shown. STEP3-VL needs none of this: its supervised stages
teach it to read. Most of these problems are lists alone, random strings with random errors, whose answer is the
commonest one. The others are samples of an earlier supervised stage with their answers and lists of random misreadings.
No model's answer is in it: what messages are worth, and how they err, is left to reinforcement learning.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from step3vl.data.shards import ShardInfo, ShardReader, find_shards, write_shards
from step3vl.types import IMAGE_MARK, Message, Prompt, Sample

from .template import SynthesisTemplate

ERROR_SHARES = (0.0, 0.0, 0.05, 0.15, 0.3)
"""Share of wrong characters in a problem's messages, drawn evenly."""


def write_references(
    folder: str | Path,
    template: SynthesisTemplate,
    questions: Sequence[str],
    known: Sequence[Sample],
    num_samples: int,
    least: int,
    most: int,
    seed: int = 0,
) -> list[ShardInfo]:
    """Write `<folder>/references-000000.tar` ...; the same arguments give the same bytes.

    Args:
        folder: made when missing.
        template: lays out a problem and its messages.
        questions: of which each problem has one.
        known: samples whose answers are capitals or digits; none: lists alone.
        num_samples: problems.
        least, most: messages of a long one.
        seed: of everything.
    """
    return write_shards(
        references(template, questions, known, num_samples, least, most, seed), folder, "references", 5000
    )


def references(
    template: SynthesisTemplate,
    questions: Sequence[str],
    known: Sequence[Sample],
    num_samples: int,
    least: int,
    most: int,
    seed: int = 0,
) -> Iterator[Sample]:
    """The samples. Seven in ten are short lists alone: to copy is learnt from many of them, or not at all."""
    for number in range(num_samples):
        rng = random.Random(f"references {seed} {number}")
        kind = rng.random()
        size = rng.randint(1, 6) if kind < 0.7 or kind > 0.9 else rng.randint(least, most)
        if known and kind > 0.82:
            sample = rng.choice(known)
            question, answer = Prompt(messages=sample.conversation, images=sample.images), str(sample.answer)
            messages = misread(rng, answer, size)
        else:
            question = Prompt(messages=[Message(role="user", content=rng.choice(questions))])
            messages, answer = draw_messages(rng, size)
        yield _sample(f"references-{seed}-{number:06d}", template.prompt(question, messages), answer)


def write_known(
    folder: str | Path,
    template: SynthesisTemplate,
    known: Sequence[Sample],
    num_samples: int,
    least: int,
    most: int,
    seed: int = 0,
) -> list[ShardInfo]:
    """Write `<folder>/known-000000.tar` ...: known samples with long lists alone, for a model that can copy."""
    return write_shards(_known(template, known, num_samples, least, most, seed), folder, "known", 5000)


def _known(
    template: SynthesisTemplate, known: Sequence[Sample], num_samples: int, least: int, most: int, seed: int
) -> Iterator[Sample]:
    for number in range(num_samples):
        rng = random.Random(f"known {seed} {number}")
        sample = rng.choice(known)
        turns, answer = sample.conversation, str(sample.answer)
        if rng.random() < 0.5:  # as held-out problems come: one question, no turns before it
            text = turns[-1].content.replace(IMAGE_MARK, "")
            turns = [Message(role="user", content=IMAGE_MARK * len(sample.images) + text)]
        question = Prompt(messages=turns, images=sample.images)
        messages = misread(rng, answer, rng.randint(least, most))
        yield _sample(f"known-{seed}-{number:06d}", template.prompt(question, messages), answer)


def _sample(id: str, prompt: Prompt, answer: str) -> Sample:
    return Sample(
        id=id,
        domain="text",
        subset="references",
        level=0,
        messages=[*prompt.messages, Message(role="assistant", content=answer)],
        images=prompt.images,
        answer=answer,
        answer_type="exact",
    )


def known_samples(pattern: str, num: int) -> list[Sample]:
    """The first samples of shards. Their earlier turns stay, as they do in pools."""
    readers = map(ShardReader, find_shards(pattern))
    return list(islice((reader.read(i) for reader in readers for i in range(len(reader))), num))


def draw_messages(rng: random.Random, num: int) -> tuple[list[str], str]:
    """Messages that come from one string of one to three digits or two to four capitals, and the commonest of them."""
    while True:
        is_number = rng.random() < 0.35
        alphabet = string.digits if is_number else string.ascii_uppercase
        length = rng.randint(1, 3) if is_number else rng.randint(2, 4)
        messages = misread(rng, "".join(rng.choice(alphabet) for _ in range(length)), num)
        found = Counter(messages).most_common(2)
        if len(found) == 1 or found[0][1] > found[1][1]:
            return messages, found[0][0]


def misread(rng: random.Random, truth: str, num: int) -> list[str]:
    """A text of digits or capitals, read `num` times with the same share of errors."""
    alphabet = string.digits if truth.isdigit() else string.ascii_uppercase
    share = rng.choice(ERROR_SHARES)
    return [_misread(rng, truth, share, alphabet) for _ in range(num)]


def _misread(rng: random.Random, truth: str, share: float, alphabet: str) -> str:
    """Characters are replaced; now and then one is lost or added."""
    characters = [rng.choice(alphabet) if rng.random() < share else character for character in truth]
    draw = rng.random()
    if draw < share / 4 and len(characters) > 1:
        characters.pop(rng.randrange(len(characters)))
    elif draw < share / 2:
        characters.insert(rng.randrange(len(characters) + 1), rng.choice(alphabet))
    return "".join(characters)
