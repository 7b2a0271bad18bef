"""A language model as judge, where a benchmark is defined with one: it finds the answer in a long text, nothing else.

A benchmark without a judge uses rules, and its score is printed as such. A judge sees question, gold and answer; what
it cannot decide, or fails to answer, is None, and the rules decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from step3vl.types import Generator, Message, Prompt, Sampling

PROMPT = """You compare a student's answer with the correct one. Decide only whether they mean the same; do not solve
the question yourself. Differences in form, units written out, and spelling of numbers do not matter.

Question:
{question}

Correct answer:
{gold}

Student's answer:
{said}

Say one word: CORRECT or WRONG."""
LONGEST = 4000
"""Characters of an answer that a judge is shown: its end."""


class Judge:
    """Asks a generator, e.g. `step3vl.generation.client.ChatClient`, whether answers are right.

    Args:
        generator: who judges.
        max_new_tokens: of a verdict; judges that think first need more.
    """

    def __init__(self, generator: Generator, max_new_tokens: int = 2048):
        self.generator = generator
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        self.num_undecided = 0

    def verify(self, triples: Sequence[tuple[str, str, str]]) -> list[bool | None]:
        """For each (question, gold, what was said): right, wrong, or None where there is no verdict."""
        prompts = [
            Prompt(
                messages=[
                    Message(role="user", content=PROMPT.format(question=question, gold=gold, said=said[-LONGEST:]))
                ]
            )
            for question, gold, said in triples
        ]
        verdicts = [verdict(group[0].text) for group in self.generator.generate(prompts, self.sampling)]
        self.num_undecided += sum(found is None for found in verdicts)
        return verdicts


def verdict(text: str) -> bool | None:
    """The last of the two words in a judge's text, after its thoughts."""
    found = re.findall(r"\b(CORRECT|WRONG|INCORRECT)\b", text.rpartition("</think>")[2].upper())
    return found[-1] == "CORRECT" if found else None
