"""Parts whose arithmetic is the device's: pixels, cross-entropy, Muon and AdamW. Each against its result on a CPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from step3vl.losses import CrossEntropy
from step3vl.models.vision import PELang
from step3vl.optim import MuonAdamW, build_groups
from step3vl.types import IGNORE_INDEX, Batch, Grids, MultiCrop

from . import DEVICE, distance, needs_gpu

pytestmark = needs_gpu

liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="the package liger-kernel is not installed")
LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)


def test_pixels_normalised_on_the_device_equal_those_on_the_cpu():
    """To one rounding: a GPU divides by a number as a product with its inverse."""
    torch.manual_seed(0)
    encoder = PELang(16, 1, 2, 32, patch_size=8, grid_size=8, layout=LAYOUT)
    pixels = torch.randint(256, (3, 3, 48, 64), dtype=torch.uint8)
    on_cpu = encoder.normalised(pixels)
    on_gpu = encoder.to(DEVICE).normalised(pixels.to(DEVICE))
    assert on_gpu.device.type == DEVICE.type and on_gpu.dtype == on_cpu.dtype == torch.float32
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-6, atol=1e-6)


def test_an_encoder_in_bf16_equals_the_cpu_in_fp32():
    torch.manual_seed(0)
    encoder = PELang(64, 3, 2, 128, patch_size=8, grid_size=8, layout=LAYOUT)
    images = Grids.stack([torch.randint(256, (3, side, side), dtype=torch.uint8) for side in (48, 64, 48)])
    on_cpu = encoder(images).final.unstack()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        on_gpu = encoder.to(DEVICE)(images.to(DEVICE)).final.unstack()
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert distance(a, b) < 0.02


def problem(num_tokens: int = 900, width: int = 128, vocab: int = 3000) -> tuple[torch.Tensor, nn.Linear, Batch]:
    """Hidden states, an output layer, and a batch of which a third carries no label."""
    torch.manual_seed(0)
    hidden = torch.randn(1, num_tokens, width)
    head = nn.Linear(width, vocab, bias=False)
    labels = torch.randint(vocab, (1, num_tokens))
    labels[:, ::3] = IGNORE_INDEX
    zeros = torch.zeros(1, num_tokens, dtype=torch.long)
    weights = (labels != IGNORE_INDEX).float()
    return hidden, head, Batch(input_ids=zeros, labels=labels, loss_weights=weights, position_ids=zeros)


def value_and_gradients(loss: CrossEntropy, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    hidden, head, batch = problem()
    hidden = hidden.to(device, dtype).requires_grad_()
    head = head.to(device, dtype)
    total = loss(hidden, head, batch.to(device))
    mean = total.mean()
    return [mean, *torch.autograd.grad(mean, [hidden, head.weight])]


@pytest.mark.parametrize("kernel", ["chunked", pytest.param("liger", marks=liger)])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_cross_entropy_equals_the_cpu_in_fp32(kernel, dtype, noise, z_loss):
    got = value_and_gradients(CrossEntropy(kernel=kernel, z_loss=z_loss), DEVICE, dtype)
    wanted = value_and_gradients(CrossEntropy(kernel="chunked", z_loss=z_loss), torch.device("cpu"), torch.float32)
    for name, a, b in zip(("loss", "hidden", "lm_head"), got, wanted, strict=True):
        assert distance(a, b) < noise, name
    assert got[0].dtype == torch.float32, "the sum of a loss is kept in fp32"


def trained(device: torch.device, dtype: torch.dtype, num_steps: int) -> tuple[dict, dict]:
    """Parameters before and after a few steps of MuonAdamW; gradients are drawn on the CPU, so that all are equal."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(50, 64), "wide": nn.Linear(64, 160), "in_proj": nn.Linear(64, 192)})
    model = model.to(device, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MuonAdamW(build_groups(model), lr=1e-2, fused_patterns={r"in_proj\.weight$": 3})
    torch.manual_seed(1)
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).to(device, dtype)
        optimizer.step()
    return before, dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_and_adamw_step_as_on_the_cpu(dtype):
    """Muon orthogonalises in bf16, so its steps agree to bf16's noise; AdamW's agree to fp32's where weights are."""
    before, on_gpu = trained(DEVICE, dtype, num_steps=4)
    _, on_cpu = trained(torch.device("cpu"), dtype, num_steps=4)
    for name, start in before.items():
        is_muon = name in ("wide.weight", "in_proj.weight")
        start = start.cpu().float()
        moved, expected = on_gpu[name].cpu().float() - start, on_cpu[name].float() - start
        assert distance(moved, expected) < (0.05 if is_muon or dtype == torch.bfloat16 else 1e-4), name
