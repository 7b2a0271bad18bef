"""A language model decides whether an answer means the same as the gold (report: model-based verification of general
visual tasks). It sees question, gold and final answer, never the thoughts, and is told not to solve the question.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence

from step3vl.evaluation.extract import boxed, final_text
from step3vl.types import Generator, Message, Prompt, Sampling

from .base import Answered
from .quoting import GUARD, conversation, quoted

PROMPT = """You decide whether a student's final answer means the same as the correct answer. Do not solve the question.
Differences in form do not matter; missing, added or hedged content does. {guard}

{question}

{gold}

{said}

Think briefly if you must. Then end with one line, either "FINAL: YES" (same meaning) or "FINAL: NO"."""
LONGEST = 4000
"""Characters of a question, gold or answer that are shown: their ends."""
MAX_CACHED = 100_000
_FINAL = re.compile(r"FINAL\W{0,6}(YES|NO)\b", re.IGNORECASE)


class Verifier:
    """1 where the judge accepts the answer, 0 where it does not; None where the judge could not be reached.

    No answer is 0 without asking, the gold itself is 1 without asking, and what was asked before is remembered. A
    verdict that cannot be read is 0, or else answers that confuse the judge would pay; it is counted.

    Args:
        generator: who judges, greedily.
        max_new_tokens: of a verdict with its thoughts.
    """

    name = "verifier"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __init__(self, generator: Generator, max_new_tokens: int):
        self.generator = generator
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        self.counts: Counter[str] = Counter()
        self._known: OrderedDict[bytes, float] = OrderedDict()

    def __call__(self, rollouts: Sequence[Answered]) -> list[float | None]:
        values: list[float | None] = [None] * len(rollouts)
        waiting: dict[bytes, Prompt] = {}
        keys: dict[int, bytes] = {}
        for k, rollout in enumerate(rollouts):
            if rollout.completion.error is not None:
                continue
            said, gold = final_answer(rollout.text), rollout.case.answer.strip()
            if not said or said == gold:
                values[k] = float(bool(said))
                continue
            prompt = _prompt(rollout, said, gold)
            keys[k] = hashlib.sha256(prompt.messages[0].content.encode()).digest()
            if keys[k] not in self._known:
                waiting.setdefault(keys[k], prompt)
        verdicts = self._ask(waiting)
        for k, key in keys.items():
            values[k] = verdicts[key] if key in verdicts else self._known.get(key)
        self._remember(verdicts)
        return values

    def _ask(self, waiting: dict[bytes, Prompt]) -> dict[bytes, float | None]:
        if not waiting:
            return {}
        groups = self.generator.generate(list(waiting.values()), self.sampling)
        verdicts: dict[bytes, float | None] = {}
        for key, (reply,) in zip(waiting, groups, strict=True):
            found = _FINAL.findall(final_text(reply.text))
            self.counts["asked"] += 1
            self.counts["outages"] += reply.error is not None
            self.counts["unreadable_verdicts"] += reply.error is None and not found
            verdicts[key] = None if reply.error is not None else float(bool(found) and found[-1].upper() == "YES")
        return verdicts

    def _remember(self, verdicts: dict[bytes, float | None]) -> None:
        self._known.update((key, value) for key, value in verdicts.items() if value is not None)
        while len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)


def final_answer(text: str) -> str:
    """What is compared: the last box, else all that is said after the thoughts."""
    said = final_text(text)
    inside = boxed(said)
    return (inside if inside is not None and inside.strip() else said).strip()


def _prompt(rollout: Answered, said: str, gold: str) -> Prompt:
    text = PROMPT.format(
        guard=GUARD,
        question=quoted("QUESTION", conversation(rollout.prompt.messages, keep_images=False), LONGEST),
        gold=quoted("CORRECT ANSWER", gold, LONGEST),
        said=quoted("STUDENT'S ANSWER", said, LONGEST),
    )
    return Prompt(messages=[Message(role="user", content=text)])
