"""Answers by hand, and judges that say what a test wants."""

import json
import re

from PIL import Image

from step3vl.evaluation import Case
from step3vl.rewards import Answered
from step3vl.types import Completion, Message, Prompt, Region

SIDE = 1000
"""Of the image: thousandths are pixels."""


def answered(
    text, answer="", kind="exact", regions=(), gold=None, question="What is it?", size=(SIDE, SIDE), case_id="c", **more
):
    images = [Image.new("1", size)] if size else []
    prompt = Prompt(messages=[Message(role="user", content=question)], images=images)
    case = Case(
        id=case_id, prompt=prompt, answer=answer, answer_type=kind, regions=list(regions), gold=dict(gold or {})
    )
    completion = {"text": text, "token_ids": [], "truncated": False} | more
    return Answered(prompt=prompt, completion=Completion(**completion), case=case)


def placed(text, *boxes, label="answer", **more):
    """An answer to a question whose gold places are boxes."""
    return answered(text, regions=[Region(label=label, box=box) for box in boxes], **more)


def one(reward, rollout):
    (value,) = reward([rollout])
    return value


class Judge:
    """A generator that answers by a function of the prompt's text; None is an outage."""

    def __init__(self, reply):
        self.reply, self.prompts, self.samplings = reply, [], []

    def generate(self, prompts, sampling, n=1):
        self.prompts += prompts
        self.samplings += [sampling] * len(prompts)
        replies = [self.reply(prompt.messages[-1].content) for prompt in prompts]
        return [
            [Completion(text=reply or "", token_ids=[], truncated=False, error=None if reply is not None else "503")]
            for reply in replies
        ]


def both_answers(text):
    """The two answers that a pairwise judge is shown."""
    return [re.search(rf"<<<(ANSWER {k} \w+)\n(.*?)\n\1>>>", text, re.DOTALL)[2] for k in (1, 2)]


def verdict(ranking, first=3, second=3):
    return json.dumps({"reasoning_1": first, "reasoning_2": second, "ranking": ranking})
