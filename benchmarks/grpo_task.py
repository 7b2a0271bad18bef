"""What both sides of bench_grpo.py are given: sizes, tokens, reward and settings; and how they are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from step3vl.types import Example, Prompt

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}
END = SIZES["vocab_size"]
"""Id of the end token, which no model says."""
ADAMW = {"lr": 1e-30, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
"""The step is computed in full, and the weights stay: every round does the same work."""
NO_CLIPPING = 1e9
"""The norm is computed, the gradient stays as it is."""
OURS, WHOLE, BY_PROMPT = "ours", "TRL, one batch", "TRL, a batch a prompt"
PARTS = ("iteration", "responses", "rewards and update")


@dataclass(frozen=True)
class Case:
    """How many prompts, responses to each, and tokens of both; and by how much ours must be faster."""

    num_prompts: int
    group_size: int
    num_given: int
    num_new: int
    goal: float

    def __str__(self) -> str:
        return f"{self.num_prompts} prompts x {self.group_size} responses, {self.num_given} + {self.num_new} tokens"


class Tokens:
    """Texts of numbers, each its token's id; the tokenizer is TRL's too."""

    pad_id, stop_ids = 0, frozenset({END})

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace

        words = {str(id): id for id in range(SIZES["vocab_size"])} | {"<end>": END}
        self.tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
        self.tokenizer.pre_tokenizer = Whitespace()

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example:
        ids = torch.tensor(self.tokenizer.encode(prompt.messages[0].content).ids)
        return Example(id=id, input_ids=ids, labels=ids, position_ids=torch.arange(len(ids)))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))


def share_of_even(ids: Sequence[int]) -> float:
    """The reward."""
    return sum(id % 2 == 0 for id in ids) / len(ids)


class Clock:
    """CPU seconds of an iteration, and of its two parts."""

    def __init__(self) -> None:
        self.responses_s = self.iteration_s = self.start_s = 0.0

    def start(self) -> None:
        self.responses_s, self.start_s = 0.0, time.process_time()

    def stop(self) -> None:
        self.iteration_s = time.process_time() - self.start_s

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.process_time()
            found = generate(*args, **kwargs)
            self.responses_s += time.process_time() - start_s
            return found

        return timed

    def parts(self) -> dict[str, float]:
        values = (self.iteration_s, self.responses_s, self.iteration_s - self.responses_s)
        return dict(zip(PARTS, values))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
