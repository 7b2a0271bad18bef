"""A model of ours as lmms-eval 0.7 wants one, and what its answers need so that its scorers read them as meant.

`lmms-eval --model step3vl --model_args pretrained=RUN --tasks mmstar`. Tasks limit answers to 16 or 128 tokens and cut
them at the first blank line, which ends a chain of thought before it has begun; both are overruled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from step3vl.ask import ThinkingProcessor, fast_numbers, load_model
from step3vl.generation.sampler import Sampler
from step3vl.harness.adapter import prompt_of, readable
from step3vl.types import Sampling

SHORT = 128


class Step3VLChat(lmms):
    """Answers lmms-eval's requests.

    Args:
        pretrained: a run, or an imported, exported or released folder.
        batch_size: sequences in flight at once.
        max_new_tokens: longest answer; None: what the task says, which is 16 for some.
        temperature, seed: of the answers; a temperature of None is the task's.
        think: open the answer with <think>.
        device: accepted and ignored: the fastest one is taken.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        think: bool = False,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown = {key: value for key, value in unknown.items() if key != "max_batch_size" and value is not None}
        if unknown:
            raise ValueError(
                f"--model_args: unknown argument {next(iter(unknown))!r}; accepted are pretrained, batch_size, "
                "max_new_tokens, temperature, seed, think"
            )
        self.vlm, processor = load_model(Path(pretrained))
        self.max_new_tokens = None if max_new_tokens is None else int(max_new_tokens)
        self.temperature = None if temperature is None else float(temperature)
        self.seed = int(seed)
        self.sampler = Sampler(self.vlm, ThinkingProcessor(processor) if think else processor, int(batch_size))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer a request, in order. Requests are 6-tuples: (context, messages, settings, id, task, split)."""
        answers: list[str] = [""] * len(requests)
        asked = [(k, *request.args) for k, request in enumerate(requests)]
        asked.sort(key=lambda item: str(self.sampling(item[3])))
        with fast_numbers(self.vlm):
            for _, group in groupby(asked, key=lambda item: str(self.sampling(item[3]))):
                for chunk in chunks(list(group), 4 * self.sampler.batch_size):
                    prompts = [
                        prompt_of(to_messages(self.task_dict[task][split][id]))
                        for _, _, to_messages, _, id, task, split in chunk
                    ]
                    completions = self.sampler.generate(prompts, self.sampling(chunk[0][3]))
                    for (k, _, _, _, _, task, _), (completion,) in zip(chunk, completions):
                        answers[k] = readable(completion.text, task)
        return answers

    def sampling(self, settings: dict[str, Any]) -> Sampling:
        """A task's settings with what the constructor overrules; stop strings are left out."""
        own = settings.get("temperature") if settings.get("do_sample", True) else 0.0
        return Sampling(
            max_new_tokens=self.max_new_tokens or int(settings.get("max_new_tokens") or SHORT),
            temperature=self.temperature if self.temperature is not None else float(own or 0.0),
            seed=self.seed,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise ValueError("step3vl answers in free text; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise ValueError("step3vl answers in one turn here; tasks of several rounds are not supported")


def chunks(items: list[Any], size: int) -> list[list[Any]]:
    """Lists of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
