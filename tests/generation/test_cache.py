"""Attention over shared prompts and own tokens against one softmax over all of them, while answers come and go."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from step3vl.generation.cache import NARROWEST, Answer, SharedCache, prompt_width
from step3vl.generation.shelves import Shelf, Stretch

NUM_LAYERS, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 8
CPU = torch.device("cpu")


class Simulation:
    """The cache, and beside it plain lists of every key and value."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU):
        self.cache, self.dtype, self.device = SharedCache(NUM_LAYERS, device), dtype, device
        self.kept: dict[Stretch, list[list[Tensor]]] = {}
        self.answers: list[Answer] = []

    def heads(self, num_rows: int, num_heads: int, num_tokens: int) -> Tensor:
        return torch.randn(num_rows, num_heads, num_tokens, WIDTH).to(self.device, self.dtype)

    def prefill(self, lengths: list[int]) -> list[Stretch]:
        prompts = [Stretch(length=length) for length in lengths]
        tape = self.cache.tape(prompts)
        for layer in range(NUM_LAYERS):
            pair = [self.heads(1, KEY_HEADS, sum(lengths)) for _ in range(2)]
            tape.record(layer, *pair)
            for prompt, key, value in zip(prompts, *(x.split(lengths, dim=2) for x in pair)):
                self.kept.setdefault(prompt, []).append([key, value])
        return prompts

    def enter(self, prompt: Stretch, count: int) -> None:
        new = [Answer(prompt=prompt) for _ in range(count)]
        self.cache.enter(new)
        self.answers += new
        for answer in new:
            self.kept[answer] = [list(pair) for pair in self.kept[prompt]]

    def leave(self, answers: list[Answer]) -> None:
        self.answers = [answer for answer in self.answers if answer not in answers]
        unused = {answer.prompt for answer in answers} - {answer.prompt for answer in self.answers}
        self.cache.leave([*answers, *unused])

    def step(self) -> float:
        """The largest difference from plain attention."""
        rows = self.cache.begin_step()
        assert len(rows) == len(self.answers) and set(rows) == set(self.answers)
        worst = 0.0
        for layer in range(NUM_LAYERS):
            query, key, value = (self.heads(len(rows), num_heads, 1) for num_heads in (HEADS, KEY_HEADS, KEY_HEADS))
            found = self.cache.attend(layer, query, key, value, None)
            assert found.shape == (len(rows), 1, HEADS, WIDTH) and found.dtype == self.dtype
            for k, answer in enumerate(rows):
                pair = self.kept[answer][layer]
                pair[0], pair[1] = torch.cat([pair[0], key[k : k + 1]], 2), torch.cat([pair[1], value[k : k + 1]], 2)
                wanted = torch.nn.functional.scaled_dot_product_attention(
                    query[k : k + 1].float(), pair[0].float(), pair[1].float(), enable_gqa=True
                )
                worst = max(worst, float((found[k].float() - wanted[0, :, 0]).abs().max()))
        self.cache.end_step()
        return worst


def live(simulation: Simulation, num_turns: int = 90) -> float:
    """Prompts of unequal lengths, answers that begin, end and outgrow their shelves at every moment."""
    torch.manual_seed(0)
    rng = random.Random(0)
    widest, worst = 0, 0.0
    for turn in range(num_turns):
        if turn % 8 == 0:
            for prompt in simulation.prefill([rng.randrange(1, 60) for _ in range(rng.randrange(1, 4))]):
                simulation.enter(prompt, rng.randrange(1, 5))
        if turn % 11 == 5 and simulation.answers:
            simulation.enter(rng.choice(simulation.answers).prompt, 2)
        worst = max(worst, simulation.step())
        young = [answer for answer in simulation.answers if rng.random() < 0.08 and answer.length < NARROWEST]
        simulation.leave(young + [answer for answer in simulation.answers if answer.length > rng.randrange(40, 90)])
        widest = max(widest, *(width for width, shelf in simulation.cache.answers.items() if len(shelf)))
    assert widest == 4 * NARROWEST
    return worst


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.05)])
def test_one_attention_over_all_tokens(dtype, tolerance):
    simulation = Simulation(dtype)
    assert live(simulation) < tolerance
    simulation.leave(simulation.answers)
    assert all(
        shelf.store is None for shelf in (*simulation.cache.answers.values(), *simulation.cache.prompts.values())
    )


def test_a_prompt_is_kept_once_however_many_answers_there_are():
    simulation = Simulation()
    (prompt,) = simulation.prefill([50])
    simulation.enter(prompt, 16)
    for _ in range(NARROWEST + 1):
        assert simulation.step() < 2e-6
    (shelf,) = simulation.cache.prompts.values()
    assert shelf.store is not None and shelf.store.shape == (NUM_LAYERS, 2, 1, KEY_HEADS, 64, WIDTH)
    narrow, wide = (simulation.cache.answers[width] for width in (NARROWEST, 2 * NARROWEST))
    assert narrow.store is None and wide.store is not None and wide.store.shape[2] == 16


def test_gaps_are_filled_from_the_end():
    shelf, stretches = Shelf(4, 1), [Stretch(length=k % 4 + 1) for k in range(6)]
    shelf.put(stretches)
    shelf.allocate(torch.zeros(1, 1, 4, 2))
    assert shelf.store is not None
    shelf.store += torch.arange(6.0)[:, None, None, None]
    shelf.take([stretches[0], stretches[4], stretches[2]])
    assert {stretch.slot for stretch in (stretches[1], stretches[3], stretches[5])} == {0, 1, 2}
    for k in (1, 3, 5):
        assert stretches[k].shelf is shelf and (shelf.keys[0][stretches[k].slot] == k).all()
    assert stretches[0].shelf is None and len(shelf) == 3 and shelf.longest == 4


@pytest.mark.parametrize("length", [1, 12, 13, 16, 17, 24, 25, 100, 128, 129, 4000])
def test_little_of_a_shelf_is_empty(length):
    width = prompt_width(length)
    assert length <= width <= max(12, 1.5 * length)
