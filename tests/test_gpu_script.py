"""benchmarks/gpu.py, run on a CPU at tiny scale: its counts and FLOPs by hand, its optimizers, what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from step3vl.config import compose
from step3vl.models import Qwen3Decoder
from step3vl.types import MultiCrop

ROOT = Path(__file__).parents[1]
SMALL = ["--scale", "tiny", "--device", "cpu", "--seq_len", "256", "--rows", "2", "--images", "1", "--crops", "4"]
CROPS, GLOBALS = (12, 3, 8), (16, 4, 2)  # patches a side, tokens a side, views in the batch of SMALL


@pytest.fixture
def script(monkeypatch):
    """The script as a module, imported as Python does when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # which importing it would set
    import gpu

    yield gpu
    for name in ("gpu", "gpu_parts", "drawn_batch"):
        sys.modules.pop(name, None)


def figures(script, tmp_path, *more) -> dict:
    out = tmp_path / "figures.json"
    assert script.main([*SMALL, "--steps", "2", "--json", str(out), *more]) == 0
    return json.loads(out.read_text())


def view_flops(side: int, tokens: int) -> tuple[int, int, int]:
    """(patch embedding, 3 blocks, projector) of one view; width 64, MLP 256, patch 4, decoder width 160."""
    n, half = side**2, -(-side // 2)
    blocks = 3 * (2 * n * (4 * 64**2 + 2 * 64 * 256) + 4 * n**2 * 64)
    projector = 2 * half**2 * 9 * 64 * 128 + 2 * tokens**2 * 9 * 128 * 256 + 2 * tokens**2 * 256 * 160
    return 2 * n * 64 * 3 * 4**2, blocks, projector


def decoder_flops(length: int) -> tuple[int, float, int]:
    """(matrices but the last, attention, last matrix) of one document in 4 layers; width 160, MLP 432, heads of 40."""
    matrices = 160 * 160 + 2 * 160 * 80 + 160 * 160 + 2 * 160 * 432
    return 4 * 2 * length * matrices, 4 * 4 * 160 * length**2 / 2, 4 * 2 * length * 432 * 160


def test_counts_and_flops_by_hand(script, tmp_path, capsys):
    found = figures(script, tmp_path)
    assert found["tokens"] == 512 and found["padding"] == 0
    image_tokens, text_tokens, *again = found["documents"]
    assert again == [image_tokens, text_tokens] and image_tokens + text_tokens == 256
    assert image_tokens > 4 * (9 + 2) + 1 + (16 + 2) + 256 // 8
    assert found["images"] == 10 and found["images_by_side"] == {"48": 8, "64": 2}
    views = [(view_flops(side, tokens), count) for side, tokens, count in (CROPS, GLOBALS)]
    seen = sum(count * sum(parts) for parts, count in views)
    read = sum(sum(decoder_flops(length)) for length in found["documents"])
    head = 2 * found["labels"] * 160 * 1024
    assert found["flops_a_step"] == pytest.approx(3 * (seen + read + head), rel=1e-12)
    blocks = sum(count * parts[1] for parts, count in views)
    read_again = sum(sum(decoder_flops(length)[:2]) for length in found["documents"])
    assert found["flops_computed_twice"] == pytest.approx(blocks + read_again, rel=1e-12)
    assert len(found["seconds_of_steps"]) == 2 and found["losses"][0] == pytest.approx(math.log(1024), abs=0.01)
    middle = sum(found["seconds_of_steps"]) / 2
    assert found["seconds_a_step"] == pytest.approx(middle) and found["tokens_per_s"] == pytest.approx(512 / middle)
    assert found["images_per_s"] == pytest.approx(10 / middle)
    assert found["mfu"] == pytest.approx(found["flops_a_step"] / middle / found["peak_flops"])
    assert found["hardware_utilisation"] > found["mfu"] and not found["is_10b"] and found["device"] == "cpu"
    assert found["attention"] == "per_document: a loop over documents" and found["cross_entropy"] == "chunked"
    text = capsys.readouterr().out
    assert "optimizer: adamw_fp32_moments, 12 bytes a parameter" in text and "nothing is learnt" in text


@pytest.mark.parametrize(("name", "num_bytes"), [("adamw_fp32_moments", 12), ("adamw_bf16", 8), ("sgd", 4)])
def test_optimizers_take_the_bytes_they_say(script, name, num_bytes):
    stage, batch = prepared(script)
    optimizer = script.make_optimizer(name, stage.vlm)
    before = [p.detach().clone() for p in stage.vlm.parameters()]
    script.step(stage, batch, optimizer)
    assert script.bytes_a_parameter(optimizer) == pytest.approx(num_bytes, abs=0.01)
    assert script.OPTIMIZERS[name] == num_bytes
    if name != "sgd":  # AdamW's first step moves every weight by the rate, whatever its gradient
        assert any(not torch.equal(a, b) for a, b in zip(before, stage.vlm.parameters(), strict=True))


def prepared(script):
    """The tiny stage with weights and recomputation, and a small batch."""
    torch.manual_seed(0)
    stage = script.build_stage(compose([str(script.EXPERIMENT)], scale="tiny").config)
    batch = script.draw_batch(stage.processor, 256, 2, 1, 4)
    script.materialise(stage.vlm, torch.device("cpu"))
    script.recompute_blocks(stage.vlm)
    return stage, batch


def test_what_is_computed_is_what_is_counted(script, monkeypatch):
    """torch's own counter of the products that really run, recomputation included; documents one by one, not padded.

    It sees whole squares of attention, of which we count half, and no gradient by pixels, which our factor 3 includes.
    """
    monkeypatch.setattr("step3vl.models.attention.group", lambda lengths: None)
    stage, batch = prepared(script)
    wanted = stage.vlm.flops().batch(batch, script.facts(batch)["labels"]) + script.recomputed_flops(stage.vlm, batch)
    wanted += (3 + 1) * sum(decoder_flops(length)[1] for length in batch.num_tokens)
    wanted -= sum(count * view_flops(side, tokens)[0] for side, tokens, count in (CROPS, GLOBALS))

    def product(_, a, b, **others) -> int:
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: product}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.losses(batch)["loss"].mean().backward()
    assert counter.get_total_flops() == pytest.approx(wanted, rel=1e-9)


def test_weights_are_bf16_and_rotary_frequencies_are_not(script):
    stage, _ = prepared(script)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in stage.vlm.parameters())
    assert any(p.std() > 0 for p in stage.vlm.decoder.parameters())
    width = stage.vlm.decoder.model.config.head_dim
    plain = Qwen3Decoder(160, 432, 1, 4, 2, width, 64)
    frequencies = stage.vlm.decoder.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, plain.model.rotary_emb.inv_freq)


def test_recomputation_changes_no_gradient(script):
    torch.manual_seed(0)
    stage = script.build_stage(compose([str(script.EXPERIMENT)], scale="tiny").config)
    batch = script.draw_batch(stage.processor, 256, 1, 1, 4)
    script.materialise(stage.vlm, torch.device("cpu"))
    gradients = []
    for recompute in (False, True):
        if recompute:
            script.recompute_blocks(stage.vlm)
        stage.losses(batch)["loss"].mean().backward()
        gradients.append([p.grad.clone() for p in stage.vlm.parameters()])
        stage.vlm.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fp32_moments_step_as_adamw(script):
    import gpu_parts

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.full((3, 5), 0.5)) for _ in range(2))
    numbers = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = gpu_parts.AdamWFp32Moments([ours], **numbers), torch.optim.AdamW([theirs], **numbers)
    for _ in range(4):
        gradient = torch.randn(3, 5)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_next_optimizer_is_tried_when_one_does_not_fit(script, monkeypatch, capsys):
    stage, batch = prepared(script)
    plain = script.step

    def cramped(stage, batch, optimizer):
        if type(optimizer) is not torch.optim.SGD:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(stage, batch, optimizer)

    monkeypatch.setattr(script, "step", cramped)
    name, optimizer, losses = script.warm_up(stage, batch, "largest", torch.device("cpu"))
    assert name == "sgd" and type(optimizer) is torch.optim.SGD and len(losses) == script.NUM_WARM_UPS
    text = capsys.readouterr().out
    assert "adamw_fp32_moments: does not fit" in text and "adamw_bf16: does not fit" in text
    with pytest.raises(ValueError, match="nothing fits"):
        script.warm_up(stage, batch, "adamw_bf16", torch.device("cpu"))


def test_fewer_layers_are_said_loudly_at_paper_scale(script, capsys, monkeypatch):
    """The paper's model is built without memory; here the run ends where its weights would be made."""

    def stop(vlm, device):
        raise ValueError("stopped before the weights")

    monkeypatch.setattr(script, "materialise", stop)
    options, overrides = script.read_options(
        ["--device", "cpu", "--scale", "tiny", "--seq_len", "1024", "--images", "0"]
    )
    options.scale = "paper"
    with pytest.raises(ValueError, match="stopped"):
        script.measure(options, overrides)
    assert "NOT STEP3-VL-10B" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="stopped"):
        script.measure(options, ["model.vlm.decoder.num_layers=2"])
    assert "NOT STEP3-VL-10B: 3,6" in capsys.readouterr().out


def test_images_are_cut_as_wanted(script):
    from drawn_batch import image_size

    from step3vl.data.images import plan

    for layout in (MultiCrop(), MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)):
        for count in (0, 2, 4, 6, 9, 12):
            assert plan(*image_size(count, layout), layout).num_crops == count
    with pytest.raises(ValueError, match="--crops 37: no image is cut so"):
        image_size(37, MultiCrop())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--device", "cpu"], "too much for a CPU; add --scale tiny"),
        ([*SMALL, "--rows", "0"], "--rows must be at least 1, got 0"),
        ([*SMALL, "stray"], "unknown argument 'stray'"),
        ([*SMALL, "--seq_len", "64"], "1 images of 4 crops take 77 of 64 tokens"),
        ([*SMALL, "--model.vlm.decoder.num_heads=3"], "num_heads 3 is not a multiple"),
    ],
)
def test_what_cannot_be_is_one_sentence(script, capsys, args, words):
    assert script.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so(script, capsys):
    assert script.main([]) == 2
    assert "needs an NVIDIA GPU and torch sees none here" in capsys.readouterr().err
