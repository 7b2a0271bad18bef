"""Two ranks that hold pieces of one model: neither waits for ever, and each says what one process says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from step3vl.generation.ranks import Ranks
from step3vl.types import Example, Message, Prompt

from ..parallel.ranks import IMAGE, launch

SCRIPT = """
import os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from step3vl.generation.sampler import Sampler
from step3vl.losses import CrossEntropy
from step3vl.parallel import shard
from step3vl.types import Sampling
from tests.generation.test_ranks import Letters, awake, prompts
from tests.parallel.ranks import small_batch, small_vlm

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
CASES = [  # prompts of either rank; # and + are images of two sizes
    (["abc", "#d", "efgh#+", "b", "+a"], ["h"]),
    (["a#b#c", "b"], []),
    (["abc", "de"], ["f", "ghij", "k"]),
    ([], ["+", "a+b", "cdefg", "#"]),
    ([], []),
]
GREEDY, HOT = Sampling(max_new_tokens=9), Sampling(max_new_tokens=15, temperature=1.0, seed=3)
turns = 0
for deepstack in (False, True):
    torch.manual_seed(0)
    whole = awake(small_vlm(deepstack, init_std=0.3))
    vlm = small_vlm(deepstack, init_std=0.3)
    vlm.load_state_dict(whole.state_dict())
    shard(vlm, [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()], mesh)
    vlm.num_encoder_passes = 2  # as stages set it for training
    for sampling, cases, n, batch_size in ((GREEDY, CASES, 1, 2), (HOT, CASES[: 4 if deepstack else 1], 3, 5)):
        for texts in cases:
            wanted = Sampler(whole, Letters(), batch_size).generate(prompts(texts[rank]), sampling, n)
            found = Sampler(vlm, Letters(), batch_size).generate(prompts(texts[rank]), sampling, n)
            assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in wanted]
            for one, other in zip(sum(found, []), sum(wanted, [])):
                assert (torch.tensor(one.logprobs) - torch.tensor(other.logprobs)).abs().max() < 1e-4
            turns += max((c.num_tokens for g in found for c in g), default=0)
        assert vlm.num_encoder_passes == 2
    for model in (vlm, whole):  # training goes on
        batch = small_batch(5, (32, 16))
        CrossEntropy()(model(batch), model.decoder.lm_head, batch).value.backward()
    for (name, p), q in zip(whole.named_parameters(), vlm.parameters()):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=2e-5, rtol=1e-4, msg=lambda m: name + m)
every = [None, None]
dist.all_gather_object(every, turns)
assert every[0] != every[1], "the ranks' answers must differ in length"
dist.barrier()
os._exit(0)  # taking torch's threads down can abort the process
"""


class Letters:
    """Letters are tokens; # is an image of 32 pixels, four visual tokens; + is one of 16 pixels, one token."""

    pad_id, stop_ids = 0, {8, 20, 30, 41, 55}

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example:
        ids: list[int] = []
        views: list[Tensor] = []
        for letter in prompt.messages[0].content:
            if letter in "#+":
                side = 32 if letter == "#" else 16
                ids += [IMAGE] * (side // 16) ** 2
                seed = torch.Generator().manual_seed(len(ids))
                views.append(torch.randint(0, 256, (3, side, side), generator=seed, dtype=torch.uint8))
            else:
                ids.append(10 + ord(letter) - ord("a"))
        tokens = torch.tensor(ids)
        return Example(
            id=id,
            input_ids=tokens,
            labels=tokens,
            position_ids=torch.arange(len(ids)),
            views=views,
            num_visual_tokens=ids.count(IMAGE),
        )

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(messages=[Message(role="user", content=text)]) for text in texts]


def awake(vlm):
    """DeepStack starts at zero."""
    for name, weight in vlm.named_parameters():
        if ".last." in name:
            nn.init.normal_(weight, std=0.1)
    return vlm


@pytest.mark.timeout(200)
def test_ranks_with_other_prompts_end_together_and_say_what_one_process_says(tmp_path):
    launch(SCRIPT, tmp_path)


def test_a_rank_that_holds_all_is_alone():
    ranks = Ranks(nn.Linear(2, 2))
    assert ranks.is_alone and not ranks.is_sharded
    assert ranks.largest(3, 0) == (3, 0)
