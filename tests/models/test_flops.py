"""Counted FLOPs against torch's own counter and against the figures of the full-size model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from step3vl.models import ConvProjector, DeepStack, Qwen3Decoder, VisionLanguageModel
from step3vl.models.flops import backward_factors
from step3vl.models.vision import DINOv3, PELang, SigLIP2
from step3vl.models.vision.base import step_layout
from step3vl.types import Batch, Grids, MultiCrop, Size

LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)
SIZES = dict(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
ENCODERS = {
    "pe_lang": lambda: PELang(32, 2, 2, 64, patch_size=8, grid_size=8, layout=LAYOUT),
    "dinov3": lambda: DINOv3(32, 2, 2, 64, patch_size=8, layout=LAYOUT),
    "siglip2": lambda: SigLIP2(32, 2, 2, 64, patch_size=8, grid_size=8, layout=LAYOUT),
}


def counted(call) -> int:
    plain = sdpa_kernel(SDPBackend.MATH)  # torch's counter does not know the fused kernel of CPUs
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        call()
    return counter.get_total_flops()


def vlm(encoder="pe_lang", deepstack=None) -> VisionLanguageModel:
    return VisionLanguageModel(ENCODERS[encoder](), ConvProjector, Qwen3Decoder(**SIZES, vocab_size=64), deepstack)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", [48, 64])
def test_encoders(encoder, side):
    model = ENCODERS[encoder]()
    images = Grids.stack([torch.randn(3, side, side)] * 2)
    assert 2 * model.flops(side // 8, side // 8) == pytest.approx(counted(lambda: model(images)), rel=0.01)


@pytest.mark.parametrize("side", [5, 6, 8])
def test_projector(side):
    model = ConvProjector(16, 24)
    assert model.flops(side, side) == counted(lambda: model(torch.randn(1, side, side, 16)))


@pytest.mark.parametrize("merger", ["pool_mlp", "unshuffle", "conv"])
@pytest.mark.parametrize("side", [6, 8])
def test_deepstack(merger, side):
    model = DeepStack(16, 24, taps=(0, 1), inject_after=(0, 1), merger=merger)
    tapped = [Grids.stack([torch.randn(side, side, 16)])] * 2
    assert model.flops(side, side) == counted(lambda: model(tapped))


def test_decoder_counts_half_the_square_and_the_head_apart():
    model, length = Qwen3Decoder(**SIZES, vocab_size=64, attention="sdpa"), 40
    ids = torch.randint(64, (1, length))
    total = counted(lambda: model(model.embed(ids), torch.arange(length)[None]))
    attention = 2 * 4 * 32 * length * length  # torch counts the whole square
    assert model.flops(length) == total - attention / 2
    hidden = torch.randn(7, 32)
    assert model.head_flops(7) == counted(lambda: model.lm_head(hidden))


def test_full_size_figures():
    """One 728 px view is 11.63 TFLOP, a 504 px crop 5.05, and a token costs 16.3 to 53.8 GFLOP by document length."""
    with torch.device("meta"):
        encoder = PELang(1536, 47, 16, 8960, patch_size=14, grid_size=52, layout=step_layout(14))
        projector = ConvProjector(1536, 4096)
        decoder = Qwen3Decoder(4096, 12288, 36, 32, 8, 128, 151936)
    for side, tera in ((52, 11.63), (36, 5.05)):
        assert encoder.flops(side, side) + projector.flops(side, side) == pytest.approx(tera * 1e12, rel=0.01)
    for length, giga in ((4096, 16.3), (8192, 17.6), (32768, 24.8), (131072, 53.8)):
        whole = decoder.flops(length) + decoder.head_flops(length)
        assert whole / length == pytest.approx(giga * 1e9, rel=0.01)


def test_training_is_three_forwards_and_frozen_parts_less():
    model = vlm()
    assert backward_factors([model.vision_encoder, None, model.decoder]) == [3, 2, 3]
    model.vision_encoder.requires_grad_(False)
    assert backward_factors([model.vision_encoder, model.projector, model.decoder]) == [1, 3, 3]
    model.decoder.requires_grad_(False)
    assert backward_factors([model.vision_encoder, model.projector, model.decoder]) == [1, 3, 2]


def test_a_batch_costs_what_its_samples_cost():
    flops = vlm(deepstack=lambda d, e: DeepStack(d, e, (0, 1), (0, 1))).flops()
    views = [torch.zeros(3, 48, 48, dtype=torch.uint8)] * 4 + [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2
    batch = Batch(
        input_ids=torch.zeros(2, 40, dtype=torch.long),
        labels=torch.zeros(2, 40, dtype=torch.long),
        loss_weights=torch.ones(2, 40),
        position_ids=torch.zeros(2, 40, dtype=torch.long),
        images=Grids.stack(views),
        num_tokens=[30, 10, 25],
    )
    sizes = [Size(30, 5, 4, 1), Size(10, 2, 0, 1), Size(25, 1, 0, 0)]
    assert flops.batch(batch, 8) == pytest.approx(sum(map(flops.sample, sizes)), rel=1e-12)
    assert flops.batch(batch, 9) - flops.batch(batch, 8) == pytest.approx(3 * 2 * 32 * 64)
