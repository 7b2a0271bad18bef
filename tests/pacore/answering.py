"""A generator whose answers are a function of the question, its number in the call and the seed; it notes each call."""

from step3vl.types import Completion, Message, Prompt


class Notes:
    """`say(prompt, sampling, number)` returns text, or an exception for an answer that failed."""

    def __init__(self, say):
        self.say, self.calls = say, []

    def generate(self, prompts, sampling, n=1):
        self.calls.append((list(prompts), sampling, n))
        return [[self._one(prompt, sampling, k) for k in range(n)] for prompt in prompts]

    def _one(self, prompt, sampling, number):
        said = self.say(prompt, sampling, number)
        if isinstance(said, Exception):
            return Completion(text="", token_ids=[], truncated=False, error=str(said))
        return Completion(text=said, token_ids=[1], truncated=False, num_tokens=len(said.split()))


def asked(text, *images, before=()):
    return Prompt(messages=[*before, Message(role="user", content=text)], images=list(images))
