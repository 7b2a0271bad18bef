"""One decoder training step on 48 long-tailed documents: packed with attention per document, against padding.

Ratios of process CPU time within one run; every variant must give the gradients of the padded one. Run: make bench
"""

import time

import pytest
import torch

from step3vl.models import Qwen3Decoder

NUM_DOCUMENTS, LONGEST, VARIANTS = 48, 1024, ("padded", "padded, sorted by length", "packed")


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lengths = torch.empty(NUM_DOCUMENTS).log_normal_(5.2, 0.8).long().clamp(8, LONGEST).tolist()
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
    }
    decoder = Qwen3Decoder(**sizes, vocab_size=512, attention="per_document")
    documents = [torch.randn(length, 256) for length in lengths]
    return decoder, documents


def step(decoder, documents, variant):
    """Forward and backward of the summed hidden states' squares; returns the loss."""
    decoder.zero_grad()
    if variant != "packed":  # eight to a batch
        total = 0.0
        documents = sorted(documents, key=len) if "sorted" in variant else documents
        for group in (documents[i : i + 8] for i in range(0, len(documents), 8)):
            embeds = torch.nn.utils.rnn.pad_sequence(group, batch_first=True)  # [8,T,D]
            mask = torch.arange(embeds.shape[1]) < torch.tensor([len(d) for d in group])[:, None]
            positions = torch.arange(embeds.shape[1]).expand(mask.shape)
            loss = decoder(embeds, positions, attention_mask=mask)[mask].square().sum()
            loss.backward()
            total += float(loss.detach())
        return total
    embeds = torch.cat(documents)[None]  # [1,T,D]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    loss = decoder(embeds, positions).square().sum()
    loss.backward()
    return float(loss.detach())


@pytest.fixture(scope="module")
def gradient(problem):
    decoder, documents = problem
    step(decoder, documents, "padded")
    return torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None]).clone()


@pytest.mark.parametrize("variant", VARIANTS)
def test_pack_step(benchmark, problem, gradient, variant):
    decoder, documents = problem
    benchmark.group = f"decoder step, {NUM_DOCUMENTS} documents, {sum(map(len, documents)):,} tokens, CPU seconds"
    benchmark.pedantic(step, args=(decoder, documents, variant), rounds=3, warmup_rounds=1)
    own = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    torch.testing.assert_close(own, gradient, atol=1e-3 * float(gradient.abs().max()), rtol=1e-4)


def test_packing_is_at_least_twice_as_fast_as_padding(problem):
    """A ratio within one run, interleaved; not seconds."""
    decoder, documents = problem
    seconds = {variant: [] for variant in ("padded", "packed")}
    for _ in range(3):
        for variant, times in seconds.items():
            start = time.process_time()
            step(decoder, documents, variant)
            times.append(time.process_time() - start)
    ratio = sorted(seconds["padded"])[1] / sorted(seconds["packed"])[1]
    assert ratio > 2, f"padded / packed = {ratio:.2f}"
