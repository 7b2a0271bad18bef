"""Answers that are kept: the same model asked the same thing in the same way answers from a file.

A line is a completion, found again by a hash of the model, the prompt with its pixels, the sampling and its number. A
call to the model is repeated whole when one of its answers is missing, so that going on gives what one run gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from step3vl.types import Completion, Generator, Prompt, Sampling


class KeptAnswers:
    """A generator that asks another one, and keeps what it says; itself a `step3vl.types.Generator`.

    Args:
        generator: who answers.
        file: JSON lines; made when missing, appended to after every call. A torn last line is dropped.
        model: names the model's weights; an answer of other weights is not used.
    """

    def __init__(self, generator: Generator, file: str | Path, model: str):
        self.generator, self.file, self.model = generator, Path(file), model
        self.num_kept = self.num_asked = 0
        """Answers that came from the file, and from the model."""
        self._found: dict[str, Completion] = {}
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    key = row.pop("key")
                    self._found[key] = Completion(**row)
                except (ValueError, KeyError, TypeError):
                    continue  # torn by the end of a process

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        """As the generator's own."""
        hashes = [prompt_hash(prompt) for prompt in prompts]
        before = [hashes[:k].count(found) for k, found in enumerate(hashes)]  # the same prompt, asked twice in a call
        keys = [
            [self.key(found, sampling, number, n, num) for number in range(n)] for found, num in zip(hashes, before)
        ]
        if all(key in self._found for group in keys for key in group):
            self.num_kept += n * len(prompts)
            return [[self._found[key] for key in group] for group in keys]
        answered = self.generator.generate(prompts, sampling, n)
        self.num_asked += n * len(prompts)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            if stream.tell() and not self._ends_line():
                stream.write("\n")
            for group, completions in zip(keys, answered):
                for key, completion in zip(group, completions):
                    if completion.error is not None:
                        continue  # asked again next time
                    self._found[key] = completion
                    stream.write(json.dumps({"key": key, **asdict(completion)}) + "\n")
        return answered

    def key(self, prompt: str, sampling: Sampling, number: int, n: int, num_before: int) -> str:
        """Hash of all that an answer depends on; `prompt` is itself a hash."""
        told = json.dumps([self.model, prompt, asdict(sampling), number, n, num_before])
        return hashlib.sha256(told.encode()).hexdigest()

    def _ends_line(self) -> bool:
        return self.file.read_bytes()[-1:] == b"\n"


def prompt_hash(prompt: Prompt) -> str:
    """Hash of the messages and of every pixel."""
    found = hashlib.sha256(json.dumps([[m.role, m.content] for m in prompt.messages]).encode())
    for image in prompt.images:
        found.update(f"{image.mode}{image.size}".encode())
        found.update(image.tobytes())
    return found.hexdigest()
