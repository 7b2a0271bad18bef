"""The kernels for packed rows against the loop over documents in fp32: outputs, gradients, no leaks."""

from __future__ import annotations

from importlib.util import find_spec
from inspect import signature

import pytest
import torch
from torch.nn.attention import varlen

from step3vl.models import Qwen3Decoder
from step3vl.models.attention import packing_arguments, per_document_attention, varlen_applies

from . import DEVICE, distance, needs_gpu

pytestmark = needs_gpu

LENGTHS = [700, 1, 300, 23, 128]
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
BF16_NOISE = 0.015  # bf16 keeps 8 bits: 0.4 % a rounding, a few in a row
flash_attn = pytest.mark.skipif(find_spec("flash_attn") is None, reason="the package flash-attn is not installed")
KERNELS = ["per_document", pytest.param("flash_attention_2", marks=flash_attn)]


def heads(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query of 8 heads, key and value of 2, as a decoder layer hands them over: [1,H,T,d] with tokens outermost."""
    torch.manual_seed(0)
    shapes = [(1, sum(LENGTHS), num_heads, width) for num_heads in (8, 2, 2)]
    return [torch.randn(s, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    output, _ = per_document_attention(torch.nn.Module(), *inputs, None, **packing_arguments(LENGTHS, DEVICE))
    torch.manual_seed(1)
    upstream = torch.randn(output.shape, device=DEVICE).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [40, 64, 128])
def test_one_kernel_equals_the_loop(monkeypatch, width, dtype):
    calls = []
    kernel = varlen.varlen_attn

    def counted(*args, **kwargs):
        calls.append(1)
        return kernel(*args, **kwargs)

    counted.__signature__ = signature(kernel)
    monkeypatch.setattr(varlen, "varlen_attn", counted)
    inputs = heads(width, dtype)
    if not varlen_applies(inputs[2]):
        pytest.skip(f"{torch.cuda.get_device_name()} has no flash attention of torch's")
    fast = run(inputs)
    assert calls == [1], "the loop was taken, not the kernel"
    exact = run([x.detach().float().requires_grad_() for x in inputs])
    assert calls == [1], "fp32 must take the loop"
    for name, a, b in zip(("output", "query", "key", "value"), fast, exact, strict=True):
        assert distance(a, b) < BF16_NOISE, name


def decoder(attention: str = "per_document") -> Qwen3Decoder:
    torch.manual_seed(0)
    return Qwen3Decoder(256, 512, 3, 8, 2, 64, 512, attention=attention, init_std=0.05).to(DEVICE)


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(512, (1, sum(LENGTHS)), device=DEVICE)
    return ids, torch.cat([torch.arange(n, device=DEVICE) for n in LENGTHS])[None]


@pytest.mark.parametrize("attention", KERNELS)
def test_a_decoder_in_bf16_equals_separate_documents_in_fp32(attention):
    model, exact = decoder(attention), decoder()
    ids, positions = packed()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        hidden = model(model.embed(ids), positions)
    parts = [
        exact(exact.embed(part), torch.arange(part.shape[1], device=DEVICE)[None]) for part in ids.split(LENGTHS, 1)
    ]
    expected = torch.cat(parts, dim=1)
    assert distance(hidden, expected) < 2 * BF16_NOISE
    torch.manual_seed(3)
    upstream = torch.randn_like(expected)
    (hidden * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for (name, a), b in zip(model.model.named_parameters(), exact.model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        assert distance(a.grad, b.grad) < 4 * BF16_NOISE, name


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_no_gradient_leaks_between_documents(attention, document):
    """Exactly zero, not small: a leak of one bit would be an error of the boundaries."""
    model = decoder(attention)
    ids, positions = packed()
    embeds = model.embed(ids).detach().requires_grad_()
    start, stop = STARTS[document], STARTS[document + 1]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        hidden = model(embeds, positions)
    (gradient,) = torch.autograd.grad(hidden[:, start:stop].float().square().sum(), embeds)
    assert not gradient[:, :start].any() and not gradient[:, stop:].any()
    assert gradient[:, start:stop].abs().sum(-1).all()


def test_a_decoder_in_fp32_equals_the_cpu():
    model = decoder()
    ids, positions = packed()
    on_gpu = model(model.embed(ids), positions)
    model.cpu()
    on_cpu = model(model.embed(ids.cpu()), positions.cpu())
    assert distance(on_gpu, on_cpu) < 1e-4
