"""Recomputed blocks: the same losses and gradients, the same names, less kept between forward and backward."""

import copy

import pytest
import torch
from torch import nn

from step3vl.losses import CrossEntropy
from step3vl.models import ConvProjector, VisionLanguageModel
from step3vl.parallel import recompute
from step3vl.parallel.recompute import is_recomputed
from step3vl.stages import PretrainStage

from ..models.conftest import build_card
from .ranks import IMAGE, small_batch, small_vlm


def both(make):
    torch.manual_seed(0)
    plain = make()
    again = copy.deepcopy(plain)
    recompute([*again.vision_encoder.blocks(), *again.decoder.blocks()])
    return plain, again


def sharp(vlm):
    """DeepStack's last maps start at zero; here they are not."""
    for merger in vlm.deepstack.mergers:
        nn.init.normal_(merger.last.weight, std=0.1)
    return vlm


def with_dinov3():
    vision, decoder = build_card("vision/dinov3_vits16.yaml", "tiny"), build_card("decoder/qwen3_8b.yaml", "tiny")
    vlm = VisionLanguageModel(vision, ConvProjector, decoder)
    vlm.bind(IMAGE)
    return vlm


def loss(vlm, batch):
    return CrossEntropy()(vlm(batch), vlm.decoder.lm_head, batch).value


@pytest.mark.parametrize("make", [lambda: sharp(small_vlm(True)), with_dinov3], ids=["pe_lang_deepstack", "dinov3"])
def test_losses_and_gradients_are_equal(make):
    plain, again = both(make)
    side = plain.image_spec.patch_size * 4
    batch = small_batch(0, (32, 16) if side == 16 else ())
    if side != 16:
        batch.images = small_batch(0, (side,)).images
        batch.input_ids[0, 2] = IMAGE
    for vlm in (plain, again):
        loss(vlm, batch).backward()
    torch.testing.assert_close(loss(again, batch), loss(plain, batch), atol=1e-6, rtol=0)
    for (name, p), q in zip(plain.named_parameters(), again.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert [n for n, p in plain.named_parameters() if p.grad is None] == [
        n for n, p in again.named_parameters() if p.grad is None
    ]


def test_each_block_runs_twice_and_names_stay():
    plain, again = both(small_vlm)
    assert list(again.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in again.named_modules()] == [n for n, _ in plain.named_modules()]
    recompute(again.decoder.blocks())  # twice is as once
    calls = []
    for block in again.decoder.blocks():
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    value = loss(again, small_batch(0))
    assert len(calls) == len(again.decoder.blocks())
    value.backward()
    assert len(calls) == 2 * len(again.decoder.blocks())
    with torch.no_grad():
        again(small_batch(0))
    assert len(calls) == 3 * len(again.decoder.blocks())


def kept_bytes(vlm, batch):
    """Bytes of tensors kept for backward, each storage once; what blocks keep to run again are their inputs."""
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in vlm.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    def keep_input(block, given):
        if is_recomputed(block):
            keep(given[0])

    for block in [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()]:
        block.register_forward_pre_hook(keep_input)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(vlm, batch)
    size = sum(storage.nbytes() for storage in kept.values())
    value.backward()
    return size


def test_less_is_kept():
    plain, again = both(lambda: small_vlm(num_layers=8))
    batch = small_batch(0, (32, 32), length=256)
    stored, recomputed = kept_bytes(plain, batch), kept_bytes(again, batch)
    assert 0 < recomputed < 0.35 * stored, f"{recomputed} of {stored} bytes"


def test_utilisation_counts_what_is_wanted_once():
    plain, again = both(small_vlm)
    batch = small_batch(0, (32,))
    assert again.flops().batch(batch, 5) == plain.flops().batch(batch, 5) > 0


@pytest.mark.parametrize("which", ["none", "vision", "decoder", "blocks"])
def test_the_stage_chooses_whose_blocks(which):
    vlm = small_vlm()
    stage = PretrainStage(vlm, None, torch.optim.AdamW, recompute=which)
    stage.trainer = type("OneRank", (), {"world_size": 1, "strategy": None})()
    stage.configure_model()
    chosen = {"vision": vlm.vision_encoder.blocks(), "decoder": vlm.decoder.blocks()}
    for part, blocks in chosen.items():
        assert all(is_recomputed(block) == (which in (part, "blocks")) for block in blocks)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"model.recompute is 'all'; accepted are none, vision, decoder, blocks"):
        PretrainStage(small_vlm(), None, torch.optim.AdamW, recompute="all")
