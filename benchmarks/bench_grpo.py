"""One GRPO iteration of `RLStage` against TRL's `GRPOTrainer`: responses, rewards, advantages and one policy step.

Both have the same Qwen3 weights, tokenizer, prompts, numbers of responses and tokens, reward, loss and AdamW, in fp32
and without a reference model. The end token lies outside of the vocabulary, so that every response has its full length.
TRL generates with transformers' `generate` and runs at its best plain settings, with one batch and with a batch a
prompt. Process CPU time, one thread, by turns. A time counts only if, for TRL's responses, our stage finds the same
rewards and the same gradient. In the update, responses share their prompt but in the last case, where that would save
too little. Needs TRL (pip install trl). Run: make bench
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest
import torch
from gate import abstain, ratio
from grpo_peers import peers
from grpo_task import OURS, PARTS, Case
from torch import Tensor

from step3vl.types import Completion, Prompt, Sampling

pytest.importorskip("trl", reason="TRL is not installed")

ROUNDS = 3
TOLERANCE = 1e-5
"""Of all gradients together, relative to their norm."""
CASES = [Case(4, 16, 512, 64, 5.0), Case(8, 16, 64, 64, 1.8), Case(8, 16, 16, 112, 1.15)]


class Repeats:
    """A generator that says what another one said."""

    def __init__(self, answers: dict[str, list[list[int]]]):
        self.answers = answers

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]:
        return [
            [
                Completion(text="", token_ids=ids, truncated=True, num_tokens=len(ids))
                for ids in self.answers[prompt.messages[0].content]
            ]
            for prompt in prompts
        ]


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the wanted ones."""
    assert found.keys() == wanted.keys()
    one, two = (torch.cat([g[name].flatten().double() for name in wanted]) for g in (found, wanted))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grpo_iteration(case, tmp_path):
    """Prints all ratios; fails where ours is slower than its goal against the better of TRL's two settings."""
    ours, theirs = peers(case, tmp_path)
    print(f"\n{case}")
    for name, peer in theirs.items():
        peer.run()
        ours.stage.generator = Repeats(peer.answers)
        ours.run()
        earned = {g[0].prompt.messages[0].content: [r.score.total for r in g] for g in ours.stage.groups}
        assert earned == peer.rewards and len({value for group in earned.values() for value in group}) > 1
        error = distance(ours.gradients, peer.gradients)
        print(f"  {name}: gradients off by {error:.1e}")
        assert error < TOLERANCE
    ours.stage.generator = None
    ours.run()  # all variants have run once now
    runs = {name: peer.run for name, peer in theirs.items()} | {OURS: ours.run}
    seconds: dict[str, dict[str, list[float]]] = {part: {name: [] for name in runs} for part in PARTS}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            for part, value in run().items():
                seconds[part][name].append(value)
    found = {
        part: {name: ratio(seconds[part], name, OURS, f"{part}: {name} / ours") for name in theirs} for part in PARTS
    }
    num = case.num_prompts * case.group_size
    print({name: f"{num / median(values):.1f} responses per CPU second" for name, values in seconds[PARTS[0]].items()})
    abstain(seconds[PARTS[0]])
    assert min(found[PARTS[0]].values()) >= case.goal
