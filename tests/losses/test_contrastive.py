"""Contrastive losses equal their formulas, transformers' models, and one rank with everything."""

import math

import pytest
import torch
import torch.nn.functional as F

from step3vl.losses.contrastive import SigmoidContrast, SoftmaxContrast

from ..parallel.ranks import launch


def embeddings(num=6, width=5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(num, width, requires_grad=True), torch.randn(num, width, requires_grad=True)


def test_softmax_is_the_formula_by_loops():
    images, texts = (x.detach() for x in embeddings())
    loss = SoftmaxContrast(temperature=0.2)
    found = loss(images, texts)
    expected = 0.0
    for i in range(6):
        like = [math.exp(float(F.cosine_similarity(images[i], texts[j], 0)) / 0.2) for j in range(6)]
        back = [math.exp(float(F.cosine_similarity(images[j], texts[i], 0)) / 0.2) for j in range(6)]
        expected -= 0.5 * (math.log(like[i] / sum(like)) + math.log(back[i] / sum(back)))
    assert float(found.value.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(found.weight) == 6


def test_sigmoid_is_the_formula_by_loops():
    images, texts = (x.detach() for x in embeddings())
    found = SigmoidContrast(log_scale=math.log(10), bias=-10.0)(images, texts)
    expected = 0.0
    for i in range(6):
        for j in range(6):
            logit = 10 * float(F.cosine_similarity(images[i], texts[j], 0)) - 10
            expected += math.log(1 + math.exp(-logit if i == j else logit))
    assert float(found.value.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(found.weight) == 6


def test_as_transformers_clip_and_siglip():
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 50, "max_position_embeddings": 8}
    vision = {**size, "image_size": 16, "patch_size": 8}
    ids, pixels = torch.randint(3, 50, (4, 8)), torch.randn(4, 3, 16, 16)
    ids[:, -1] = 49  # CLIP's end of text
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config={**text, "eos_token_id": 49}, vision_config=vision, projection_dim=12))
    out = clip.eval()(input_ids=ids, pixel_values=pixels, return_loss=True)
    ours = SoftmaxContrast(temperature=float((-clip.logit_scale.detach()).exp()), max_scale=1000)
    assert float(ours(out.image_embeds, out.text_embeds).mean()) == pytest.approx(float(out.loss), rel=1e-5)

    siglip = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)).eval()
    with torch.no_grad():
        siglip.logit_scale.fill_(1.3), siglip.logit_bias.fill_(-2.0)
    out = siglip(input_ids=ids, pixel_values=pixels, return_loss=True)
    ours = SigmoidContrast(log_scale=1.3, bias=-2.0)
    assert float(ours(out.image_embeds, out.text_embeds).mean()) == pytest.approx(float(out.loss), rel=1e-5)


def test_an_equal_caption_is_neither_right_nor_wrong():
    images, texts = embeddings()
    captions = torch.tensor([0, 1, 2, 0, 4, 5])  # 0 and 3 say the same
    likeness = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T / 0.5
    gone = torch.zeros(6, 6, dtype=torch.bool)
    gone[0, 3] = gone[3, 0] = True
    expected = sum(F.cross_entropy(x.masked_fill(gone, -1e9), torch.arange(6), reduction="sum") for x in (
        likeness, likeness.T)) / 2  # fmt: skip
    torch.testing.assert_close(SoftmaxContrast(0.5)(images, texts, captions).value, expected)
    loss = SigmoidContrast()
    every = -F.logsigmoid((2 * torch.eye(6) - 1) * (10 * 0.5 * likeness - 10))
    found = loss(images, texts, captions).value
    torch.testing.assert_close(found, every.masked_fill(gone, 0).sum(), rtol=1e-5, atol=1e-5)
    assert found < loss(images, texts).value


def test_temperature_is_learnt_and_capped():
    images, texts = embeddings()
    loss = SoftmaxContrast(temperature=0.02, max_scale=50)
    loss(images, texts).value.backward()
    assert loss.log_scale.grad is not None and loss.log_scale.grad != 0
    with torch.no_grad():
        loss.log_scale.fill_(10.0)
    capped = loss(images, texts).value
    torch.testing.assert_close(capped, SoftmaxContrast(temperature=0.02, max_scale=50)(images, texts).value)
    assert float(loss.log_scale) == pytest.approx(math.log(50))


def test_bad_input():
    with pytest.raises(ValueError, match="temperature must be above 0"):
        SoftmaxContrast(temperature=0)
    with pytest.raises(ValueError, match=r"\[n,D\] each; got \[6, 5\] and \[4, 5\]"):
        SoftmaxContrast()(embeddings()[0], embeddings(4)[0])


SCRIPT = """
import os, torch, torch.distributed as dist
from step3vl.losses.contrastive import SigmoidContrast, SoftmaxContrast
from step3vl.losses.self_distillation import keep_apart, sinkhorn_knopp

dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(0, 5) if rank == 0 else slice(5, 8)  # uneven
torch.manual_seed(0)
images, texts, logits = torch.randn(8, 6), torch.randn(8, 6), torch.randn(8, 7) * 3
captions = torch.tensor([0, 1, 2, 3, 4, 5, 1, 7])
for kind in (SoftmaxContrast, SigmoidContrast, None):
    whole_i, whole_t = images.clone().requires_grad_(), texts.clone().requires_grad_()
    own_i, own_t = images[mine].clone().requires_grad_(), texts[mine].clone().requires_grad_()
    loss = None if kind is None else kind()
    found = keep_apart(own_i) if kind is None else loss(own_i, own_t, captions[mine])
    found.value.backward()
    scale = None if kind is None else loss.log_scale.grad.clone()
    total = torch.stack([found.value.detach(), found.weight])
    dist.all_reduce(total)
    if scale is not None:
        dist.all_reduce(scale)
    groups, dist.is_initialized = dist.is_initialized, lambda: False  # as if there were no ranks
    again = None if kind is None else kind()
    wanted = keep_apart(whole_i) if kind is None else again(whole_i, whole_t, captions)
    wanted.value.backward()
    dist.is_initialized = groups
    torch.testing.assert_close(total, torch.stack([wanted.value.detach(), wanted.weight]))
    torch.testing.assert_close(own_i.grad, whole_i.grad[mine], rtol=1e-4, atol=1e-5)
    if kind is not None:
        torch.testing.assert_close(own_t.grad, whole_t.grad[mine], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scale, again.log_scale.grad, rtol=1e-4, atol=1e-5)
found = sinkhorn_knopp(logits[mine], 0.3)
groups, dist.is_initialized = dist.is_initialized, lambda: False
wanted = sinkhorn_knopp(logits, 0.3)
dist.is_initialized = groups
torch.testing.assert_close(found, wanted[mine])
dist.barrier()
os._exit(0)  # taking torch's threads down can abort the process
"""


def test_two_uneven_ranks_are_one(tmp_path):
    launch(SCRIPT, tmp_path)
