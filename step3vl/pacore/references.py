"""Lists of messages that nobody said: a warm start for tiny models, which have never read a list.

Reinforcement learning cannot begin with a skill that is never shown. STEP3-VL needs none of this: its supervised stages
teach it to read. First come lists alone, random strings with random errors; then also samples of an earlier supervised
stage with lists of random misreadings. No model's answer is in it: what messages are worth, and how they err, is left
to reinforcement learning.
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

ERROR_SHARES = (0.0, 0.0, 0.05, 0.15)
"""Share of wrong characters in a problem's messages, drawn evenly."""
RIVAL_SHARES = (0.1, 0.45)
"""Share of the messages that hold a recurring error, drawn evenly between these."""


def write_references(
    folder: str | Path,
    name: str,
    template: SynthesisTemplate,
    questions: Sequence[str],
    num_samples: int,
    most: int,
    seed: int = 0,
    rivals: bool = False,
) -> list[ShardInfo]:
    """Write `<folder>/<name>-000000.tar` ...; the same arguments give the same bytes.

    Args:
        folder: made when missing.
        name: of the shards.
        template: lays out a problem and its messages; it must end with one message a line.
        questions: of which each problem has one.
        num_samples: problems.
        most: messages of the longest one.
        seed: of everything.
        rivals: in most lists one error recurs, and none are said: who goes on with a list follows shares, who answers
            has to find the commonest.
    """
    return write_shards(references(template, questions, num_samples, most, seed, rivals), folder, name, 5000)


def references(
    template: SynthesisTemplate,
    questions: Sequence[str],
    num_samples: int,
    most: int,
    seed: int = 0,
    rivals: bool = False,
) -> Iterator[Sample]:
    """Lists alone. Two in three are said by the assistant, so that every message after the first teaches to copy.

    One label a problem teaches nothing in minutes: to copy is learnt from many of them, or not at all.
    """
    for number in range(num_samples):
        rng = random.Random(f"references {seed} {number}")
        is_said = rng.random() < 2 / 3 and not rivals
        messages, answer = draw_messages(rng, rng.randint(most // 2 if is_said else 1, most), rivals)
        prompt = template.prompt(Prompt(messages=[Message(role="user", content=rng.choice(questions))]), messages)
        if is_said:
            prompt, answer = _begun(prompt, messages)
        yield _sample(f"references-{seed}-{number:06d}", prompt, answer)


def write_known(
    folder: str | Path,
    name: str,
    template: SynthesisTemplate,
    known: Sequence[Sample],
    num_samples: int,
    most: int,
    seed: int = 0,
    rivals: bool = False,
) -> list[ShardInfo]:
    """Write `<folder>/<name>-000000.tar` ...: one question each of known samples, with a list of misreadings.

    `known` are samples whose answers are capitals or digits; the other arguments are those of `write_references`.
    """
    return write_shards(known_references(template, known, num_samples, most, seed, rivals), folder, name, 5000)


def known_references(
    template: SynthesisTemplate,
    known: Sequence[Sample],
    num_samples: int,
    most: int,
    seed: int = 0,
    rivals: bool = False,
) -> Iterator[Sample]:
    """Known samples as held-out problems come: one question with the images, no turns before it."""
    for number in range(num_samples):
        rng = random.Random(f"known {seed} {number}")
        sample = rng.choice(known)
        place = 2 * rng.randrange(len(sample.messages) // 2)
        question, answer = (message.content for message in sample.messages[place : place + 2])
        content = IMAGE_MARK * len(sample.images) + question.replace(IMAGE_MARK, "")
        prompt = Prompt(messages=[Message(role="user", content=content)], images=sample.images)
        messages = misread(rng, answer, rng.randint(1, most), rivals)
        yield _sample(f"known-{seed}-{number:06d}", template.prompt(prompt, messages), answer)


def _begun(prompt: Prompt, messages: Sequence[str]) -> tuple[Prompt, str]:
    """The prompt before its first message, and the messages as they stand in it."""
    said, content = "\n".join(messages), prompt.messages[-1].content
    if not content.endswith("\n" + said):
        raise ValueError("the warm start needs a template that ends with one message a line, such as short")
    return Prompt(messages=[Message(role="user", content=content[: -len(said) - 1])]), said


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
    """The first samples of shards, with all their turns."""
    readers = map(ShardReader, find_shards(pattern))
    return list(islice((reader.read(i) for reader in readers for i in range(len(reader))), num))


def draw_messages(rng: random.Random, num: int, rivals: bool = False) -> tuple[list[str], str]:
    """Messages that come from one string of one to three digits or two to four capitals, and the commonest of them."""
    while True:
        is_number = rng.random() < 0.35
        alphabet = string.digits if is_number else string.ascii_uppercase
        length = rng.randint(1, 3) if is_number else rng.randint(2, 4)
        messages = misread(rng, "".join(rng.choice(alphabet) for _ in range(length)), num, rivals)
        found = Counter(messages).most_common(2)
        if len(found) == 1 or found[0][1] > found[1][1]:
            return messages, found[0][0]


def misread(rng: random.Random, truth: str, num: int, rivals: bool = False) -> list[str]:
    """A text of digits or capitals, read `num` times with the same share of errors; with rivals, one often recurs."""
    alphabet = string.digits if truth.isdigit() else string.ascii_uppercase
    share = rng.choice(ERROR_SHARES)
    if not rivals or rng.random() < 0.3:
        return [_misread(rng, truth, share, alphabet) for _ in range(num)]
    place = rng.randrange(len(truth))
    rival = truth[:place] + rng.choice(alphabet) + truth[place + 1 :]
    recurs = rng.uniform(*RIVAL_SHARES)
    return [rival if rng.random() < recurs else _misread(rng, truth, share, alphabet) for _ in range(num)]


def _misread(rng: random.Random, truth: str, share: float, alphabet: str) -> str:
    """Characters are replaced; now and then one is lost or added."""
    characters = [rng.choice(alphabet) if rng.random() < share else character for character in truth]
    draw = rng.random()
    if draw < share / 4 and len(characters) > 1:
        characters.pop(rng.randrange(len(characters)))
    elif draw < share / 2:
        characters.insert(rng.randrange(len(characters) + 1), rng.choice(alphabet))
    return "".join(characters)
