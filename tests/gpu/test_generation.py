"""Generation on a GPU: attention of decoding steps against plain attention, and log-probabilities of one forward."""

from __future__ import annotations

import pytest
import torch

from step3vl.generation.sampler import Sampler

from ..generation.test_cache import Simulation, live
from ..generation.test_sampler import HOT, PROMPTS, TinyProcessor, ids_of, model, whole_logprobs
from . import DEVICE, needs_gpu

pytestmark = needs_gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_one_attention_over_all_tokens(dtype, tolerance):
    assert live(Simulation(dtype, DEVICE)) < tolerance


def test_logprobs_are_those_of_one_forward_on_the_cpu():
    vlm = model()
    wanted = Sampler(vlm, TinyProcessor()).generate(PROMPTS, HOT, n=3)
    found = Sampler(vlm.to(DEVICE), TinyProcessor()).generate(PROMPTS, HOT, n=3)
    same = [one == other for ones, others in zip(ids_of(found), ids_of(wanted)) for one, other in zip(ones, others)]
    assert sum(same) > 0.9 * len(same), "random numbers are those of the CPU; a rounding may tip a token over"
    with torch.autocast("cuda", torch.bfloat16):
        near = Sampler(vlm, TinyProcessor()).generate(PROMPTS, HOT, n=3)
    vlm.cpu()
    for ours, allowed in ((found, 1e-3), (near, 0.1)):
        for prompt, group in zip(PROMPTS, ours):
            for completion in group:
                plain = torch.tensor(whole_logprobs(vlm, prompt, completion.token_ids, HOT.temperature))
                assert (torch.tensor(completion.logprobs) - plain).abs().mean() < allowed
