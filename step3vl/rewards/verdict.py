"""The question that a pairwise judge is asked, how its verdict is read, and a judge without a model for small runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal, get_args

from step3vl.evaluation.extract import final_text
from step3vl.types import Completion, Generator, Message, Prompt, Sampling

from .quoting import GUARD, conversation, quoted

PROMPT = """You compare two answers to the same conversation. {guard}

{question}

{first}

{second}

First judge the reasoning of each: is it sound, does it rest on what is seen and given, does it lead to the answer? A
right answer with wrong reasons is worth less. Then judge which answer serves the user better: right, helpful, honest,
in the user's language, no longer than it needs to be. Neither the order nor the length of the answers speaks for them.

End with one line of JSON:
{{"reasoning_1": 1 to 5, "reasoning_2": 1 to 5, "ranking": 1 to 6}}
where 5 is the best reasoning, and ranking 1 says answer 1 is much better, 3 slightly, 4 that answer 2 is slightly
better, 6 much better."""


def comparison(asked: Prompt, first: str, second: str, longest: int, show_images: bool) -> Prompt:
    """The judge's prompt for two answers, in this order."""
    question = conversation(asked.messages, keep_images=show_images)
    shown = f"<<<CONVERSATION\n{question}\nCONVERSATION>>>"  # whole: its image marks and its images must agree
    text = PROMPT.format(
        guard=GUARD,
        question=shown,
        first=quoted("ANSWER 1", first, longest),
        second=quoted("ANSWER 2", second, longest),
    )
    return Prompt(messages=[Message(role="user", content=text)], images=list(asked.images) if show_images else [])


def probability(text: str, reasoning_share: float) -> float | None:
    """That answer 1 is the better one, from the last verdict in the judge's text; None: there is none in range.

    Ranking 1..6 becomes 1..0 and the difference of the reasoning marks -4..4 becomes 0..1; they are mixed.
    """
    for found in reversed(re.findall(r"\{[^{}]{0,400}\}", final_text(text)[-5000:])):
        try:
            verdict = json.loads(found)
        except ValueError:
            continue
        ranking = _within(verdict, "ranking", 1, 6)
        first, second = (_within(verdict, key, 1, 5) for key in ("reasoning_1", "reasoning_2"))
        if ranking is not None and first is not None and second is not None:
            return (1.0 - reasoning_share) * (6.0 - ranking) / 5.0 + reasoning_share * (4.0 + first - second) / 8.0
    return None


def _within(verdict: dict, key: str, low: int, high: int) -> float | None:
    value = verdict.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high else None


Unit = Literal["words", "letters", "pairs"]


def units_of(text: str, unit: Unit) -> list[str]:
    """What is counted of a text."""
    if unit == "words":
        return text.split()
    letters = [x for x in text.casefold() if x.isalpha()]
    return letters if unit == "letters" else [a + b for a, b in zip(letters, letters[1:])]


class VarietyJudge(Generator):
    """Judges without a model: the answer with more distinct units is better, of equal ones the shorter. For small runs.

    It takes the place of a judge's server where there is none, so that every step of RLHF can run and be tested.

    Args:
        unit: words, letters, or pairs of neighbouring letters. One may be trained for and another measured.
    """

    def __init__(self, unit: Unit = "words"):
        if unit not in get_args(Unit):
            raise ValueError(f"VarietyJudge: unit is {unit!r}; accepted are {', '.join(get_args(Unit))}")
        self.unit = unit

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        return [[self._verdict(prompt) for _ in range(n)] for prompt in prompts]

    def _verdict(self, prompt: Prompt) -> Completion:
        texts = []
        for number in (1, 2):
            found = re.search(
                rf"^<<<(ANSWER {number} \w{{12}})\n(.*)\n\1>>>$", prompt.messages[-1].content, re.DOTALL | re.MULTILINE
            )
            if found is None:
                raise ValueError(f"the prompt holds no ANSWER {number}: this judge compares two answers only")
            units = units_of(final_text(found[2]), self.unit)
            texts.append((len({*units}), -len(units)))
        ranking = 3.5 if texts[0] == texts[1] else 2 if texts[0] > texts[1] else 5
        text = json.dumps({"reasoning_1": 3, "reasoning_2": 3, "ranking": ranking})
        return Completion(text=text, token_ids=[], truncated=False, num_tokens=1)
