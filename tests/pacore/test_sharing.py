"""Sixteen chains to an image question, by our sampler: one look at the image and one prefill, then the synthesis."""

import torch
from PIL import Image

from step3vl.data import Processor
from step3vl.generation.cache import StepCache
from step3vl.generation.sampler import Sampler
from step3vl.pacore import PaCoReGenerator, exact
from step3vl.types import Sampling
from tests.pacore.answering import asked
from tests.stages.rl_run import tiny_vlm


def test_sixteen_chains_cost_one_look_and_one_prefill(monkeypatch):
    torch.manual_seed(0)
    vlm = tiny_vlm()
    processor = Processor(template="chat").bind(vlm.image_spec, vlm.projector.grid)
    vlm.bind(processor.image_token_id)
    forward, encode = vlm.forward, vlm.encode_images
    looks, prefills = [], []

    def watched(batch, cache=None, attention_mask=None):
        if not isinstance(cache, StepCache):
            prefills.append(batch.input_ids.numel())
        return forward(batch, cache=cache, attention_mask=attention_mask)

    monkeypatch.setattr(vlm, "forward", watched)
    monkeypatch.setattr(vlm, "encode_images", lambda images: looks.append(len(images)) or encode(images))
    prompt = asked("<image>Read row 2.", Image.new("RGB", (64, 64), "red"))
    counter = exact(processor)
    pacore = PaCoReGenerator(Sampler(vlm, processor, batch_size=16), [16], counter=counter, template="short")
    (((final, trace),),) = pacore.run([prompt], Sampling(max_new_tokens=4, temperature=1.0, seed=0))
    first, last = (step.num_prompt_tokens for step in trace.rounds)
    assert len(trace.rounds[0].answers) == 16 and trace.num_failed == 0 and last > first == counter.count(prompt)
    assert looks == [1, 1]  # the synthesis shows the image once more
    assert prefills == [first, last] and final.error is None
