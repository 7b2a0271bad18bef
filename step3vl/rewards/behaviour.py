"""How a model should behave whatever it answers: keep the user's language, cite what is there, know what it knows.

The report names these three regularisers and no more; the forms are ours (language, citations) or RLCR's (calibration).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from step3vl.evaluation.extract import TAIL, final_text

from .base import Answered, EachAnswer, Reward, share

_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]{0,200}`|\$\$[^$]{0,2000}\$\$|\$[^$\n]{0,500}\$"
    r"|\\\[(?:[^\\]|\\[^\[\]])*+\\\]|\\\((?:[^\\]|\\[^()])*+\\\)"  # each stops at the next opening: linear
    r"|https?://[^\s)\]>]{1,500}|</?[a-z_]{1,20}>|\\[a-zA-Z]{1,30}",
    re.DOTALL,
)
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(
    rf"(?P<cjk>[{_CJK}])|(?P<latin>[A-Za-z\u00c0-\u024f]+)|(?P<other>[^\W\d_{_CJK}A-Za-z\u00c0-\u024f]+)"
)


class LanguageConsistency(EachAnswer):
    """Minus what the share of words in the prompt's script lacks to `min_share`; -1 to 0.

    Scripts are Chinese/Japanese/Korean (a character is a word), Latin, and all others. Code, mathematics and addresses
    count for no language. A prompt without words is None; an answer without words is in order.

    Args:
        min_share: a share at or above it costs nothing.
        part: all: thoughts too. final: only what is said after them.
    """

    name = "language_consistency"
    bounds: tuple[float, float] = (-1.0, 0.0)

    def __init__(self, min_share: float = 0.9, part: Literal["all", "final"] = "all"):
        super().__init__()
        if part not in ("all", "final"):
            raise ValueError(f"part is {part!r}; accepted are all and final")
        self.min_share, self.part = share("min_share", min_share), part

    def score(self, rollout: Answered) -> float | None:
        asked = scripts(last_question(rollout))
        if not asked:
            return None
        said = scripts(rollout.text if self.part == "all" else final_text(rollout.text))
        if not said:
            return 0.0
        script = max(sorted(asked), key=lambda name: asked[name])
        return -max(0.0, self.min_share - said[script] / said.total())


class Citations(EachAnswer):
    """-1 where an answer refers to something that is not there, else 0.

    Looked up in all messages of the prompt: addresses; "Reference 3" and "Image 2"; and markers like [3], where the
    prompt itself has such markers (elsewhere they are arrays and coordinates). Code and mathematics are left out.
    """

    name = "citations"
    bounds: tuple[float, float] = (-1.0, 0.0)

    def score(self, rollout: Answered) -> float:
        source = "\n".join(message.content for message in rollout.prompt.messages)
        said = re.sub(
            r"```.*?(?:```|\Z)|`[^`\n]{0,200}`|\$[^$\n]{0,500}\$", " ", final_text(rollout.text)[-TAIL:], flags=re.S
        )
        known = markers(source)
        images = {("image", str(k + 1)) for k in range(len(rollout.prompt.images))}
        names = {(kind.lower(), number) for kind, number in _NAMED.findall(source)} | images
        if known and not markers(said) <= known:
            return -1.0
        if not {(kind.lower(), number) for kind, number in _NAMED.findall(said)} <= names:
            return -1.0
        return -1.0 if set(addresses(said)) - set(addresses(source)) else 0.0


_MARKERS = re.compile(r"(?<![\w\])])(?:\[\^?\d{1,3}\]){1,50}(?!\()")
_NAMED = re.compile(r"\b(reference|image)\s(\d{1,3})\b(?!\s?[.%]\d)", re.IGNORECASE)


class Calibration:
    """1 - (correct - confidence)^2, 0 to 1: best for a model that says how sure it is, and is right so often (RLCR).

    Confidence is the last <confidence> tag of the final text, 0 to 1 or in per cent; without one the reward is 0.

    Args:
        accuracy: says whether the answer is right, 0 to 1; where it is None, so is this.
    """

    name = "calibration"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __init__(self, accuracy: Reward):
        if tuple(accuracy.bounds) != (0.0, 1.0):
            raise ValueError(f"accuracy: reward {accuracy.name!r} has range {accuracy.bounds}; needed is 0 to 1")
        self.accuracy = accuracy
        self.counts: Counter[str] = Counter()

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        values: list[float | None] = []
        for rollout, correct in zip(rollouts, self.accuracy(rollouts), strict=True):
            said = confidence(rollout.text)
            self.counts["no_confidence"] += said is None and correct is not None
            values.append(None if correct is None else 0.0 if said is None else 1.0 - (correct - said) ** 2)
        return values


def scripts(text: str) -> Counter[str]:
    """Number of words by script: cjk, latin, other."""
    return Counter(word.lastgroup or "other" for word in _WORD.finditer(_NO_PROSE.sub(" ", text[-TAIL:])))


def addresses(text: str) -> list[str]:
    """Web addresses without the punctuation after them."""
    return [found.rstrip(".,;:!?'\"*_") for found in re.findall(r"https?://[^\s)\]>\"']{1,500}", text)]


def markers(text: str) -> set[str]:
    """Numbers of the markers [1], [^2] and [3][4]; an index like x[5] is none."""
    return {number for found in _MARKERS.findall(text) for number in re.findall(r"\d+", found)}


def last_question(rollout: Answered) -> str:
    """Text of the last user message."""
    return next((message.content for message in reversed(rollout.prompt.messages) if message.role == "user"), "")


def confidence(text: str) -> float | None:
    """What the last confidence tag says, 0 to 1; None where there is none or it says something else."""
    found = re.findall(r"<confidence>([^<]{0,40})</confidence>", final_text(text)[-TAIL:])
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{0,9})?|\.\d{1,9})\s?(%?)\s*", found[-1]) if found else None
    if match is None or not match[1].isascii():
        return None
    value = float(match[1]) / (100.0 if match[2] else 1.0)
    return value if value <= 1.0 else None
