"""One training step of STEP3-VL-10B on one GPU: tokens a second, memory, and the share of the device's peak.

The model is that of the experiment file with all its layers, in bf16. The batch is drawn words and noise images through
the real pipeline; loss, backward, clipping and optimizer are real; every block's activations are computed again in
backward. Reading data is left out. Run: python benchmarks/gpu.py (docs/gpu.md); --scale tiny --device cpu tries it out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before CUDA starts: fewer holes

import torch
from drawn_batch import draw_batch
from gpu_parts import (
    OPTIMIZERS,
    build_stage,
    bytes_a_parameter,
    make_optimizer,
    materialise,
    recompute_blocks,
    recomputed_flops,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from step3vl.callbacks.peak import peak_flops
from step3vl.config import compose
from step3vl.losses.liger import is_installed
from step3vl.models.attention import NAME, has_varlen_kernel
from step3vl.stages import PretrainStage
from step3vl.types import IGNORE_INDEX, Batch

EXPERIMENT = Path(__file__).parents[1] / "experiments/step3vl_10b/1_pretrain_phase1.yaml"
NUM_PARAMETERS = 10_171_750_144  # of STEP3-VL-10B
NUM_WARM_UPS = 3
GIB = 2**30


def read_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the overrides of the experiment file's keys."""
    parser = argparse.ArgumentParser(description="One training step on one GPU. Also --KEY=VALUE, as for step3vl fit.")
    parser.add_argument("--experiment", default=str(EXPERIMENT), help="whose model, processor and loss are taken")
    parser.add_argument("--scale", choices=["paper", "tiny"], default="paper")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: at tiny scale only")
    parser.add_argument("--optimizer", choices=["largest", *OPTIMIZERS], default="largest", help="largest that fits")
    parser.add_argument("--seq_len", type=int, default=None, help="tokens of a row (default: the experiment's)")
    parser.add_argument("--rows", type=int, default=None, help="packed rows of the batch (default: 4; 1 at tiny scale)")
    parser.add_argument("--images", type=int, default=2, help="images in a row; the rest of it is a text document")
    parser.add_argument("--crops", type=int, default=6, help="crops of an image, beside its global view")
    parser.add_argument("--steps", type=int, default=10, help=f"steps measured, after {NUM_WARM_UPS} that are not")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers, where memory is short: not 10B then")
    parser.add_argument("--attention", default=None, help="per_document | flash_attention_2 | sdpa")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), help="file for the figures")
    options, overrides = parser.parse_known_args(args)
    bad = [word for word in overrides if not (word.startswith("--") and "=" in word)]
    if bad:
        raise ValueError(f"unknown argument {bad[0]!r}; overrides are --KEY=VALUE")
    for key, least in {"seq_len": 1, "rows": 1, "steps": 1, "layers": 1, "images": 0, "crops": 0}.items():
        if getattr(options, key) is not None and getattr(options, key) < least:
            raise ValueError(f"--{key} must be at least {least}, got {getattr(options, key)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this benchmark needs an NVIDIA GPU and torch sees none here; run it where there is one, "
            "or try it out with --scale tiny --device cpu"
        )
    if options.device == "cpu" and options.scale == "paper":
        raise ValueError("ten billion parameters are too much for a CPU; add --scale tiny")
    options.rows = options.rows or {"paper": 4, "tiny": 1}[options.scale]
    overrides = [word.removeprefix("--") for word in overrides]
    overrides += [] if options.layers is None else [f"model.vlm.decoder.num_layers={options.layers}"]
    overrides += [] if options.attention is None else [f"model.vlm.decoder.attention={options.attention}"]
    return options, overrides


# ------------------------------------------------------------------------------------------------ step


def step(stage: PretrainStage, batch: Batch, optimizer: Optimizer) -> Tensor:
    """Forward, backward, clipping, update; returns the loss."""
    optimizer.zero_grad()
    loss = stage.losses(batch)["loss"].mean()
    loss.backward()
    nn.utils.clip_grad_norm_(stage.vlm.parameters(), 1.0, foreach=True)
    optimizer.step()
    return loss.detach()


def seconds_of(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call, by CUDA events on a GPU."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def warm_up(stage: PretrainStage, batch: Batch, name: str, device: torch.device) -> tuple[str, Optimizer, list[float]]:
    """Take the first steps: with the optimizer `name`, or the largest that fits. Returns it and the losses."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    num_parameters = sum(p.numel() for p in stage.vlm.parameters())
    for choice in OPTIMIZERS if name == "largest" else [name]:
        needed = OPTIMIZERS[choice] * num_parameters
        if name == "largest" and total is not None and needed > total:
            print(f"{choice}: does not fit, {needed / GIB:.1f} GiB of {total / GIB:.1f} before any activation")
            continue
        optimizer = make_optimizer(choice, stage.vlm)
        try:
            return choice, optimizer, [float(step(stage, batch, optimizer)) for _ in range(NUM_WARM_UPS)]
        except torch.OutOfMemoryError:
            print(f"{choice}: does not fit with the activations of this batch")
        stage.vlm.zero_grad()  # out here, where the exception no longer holds the tensors of its frames
        del optimizer
        gc.collect()
        torch.cuda.empty_cache()
    raise ValueError("nothing fits; give fewer --rows, a smaller --seq_len, or --layers (then it is not 10B)")


# ------------------------------------------------------------------------------------------------ report


def measure(options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Build, warm up, measure; the figures by name."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    config = compose([options.experiment], overrides, options.scale).config
    stage = build_stage(config)
    vlm = stage.vlm
    num_parameters = sum(p.numel() for p in vlm.parameters())
    if options.scale == "paper" and num_parameters != NUM_PARAMETERS:
        print(f"NOT STEP3-VL-10B: {num_parameters:,} parameters instead of {NUM_PARAMETERS:,}")
    print("text is drawn words by the packaged tokenizer, images are noise: speed is measured, nothing is learnt")
    seq_len = options.seq_len or int(config["data"]["init_args"]["seq_len"])
    batch = draw_batch(stage.processor, seq_len, options.rows, options.images, options.crops)
    about = facts(batch)
    flops, twice = vlm.flops().batch(batch, about["labels"]), recomputed_flops(vlm, batch)
    materialise(vlm, device)
    recompute_blocks(vlm)
    vlm.train()
    batch = batch.to(device)
    name, optimizer, losses = warm_up(stage, batch, options.optimizer, device)
    print(f"optimizer: {name}, {OPTIMIZERS[name]} bytes a parameter, weights and gradients included")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [seconds_of(partial(step, stage, batch, optimizer), device) for _ in range(options.steps)]
    peak_memory, of_what = peak_memory_bytes(device)
    held = bytes_a_parameter(optimizer)
    with torch.no_grad():
        losses.append(float(stage.losses(batch)["loss"].mean()))
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"the loss is not finite: {losses}; the figures of such a run mean nothing")
    seconds = median(times)
    peak, peak_from = peak_flops(device, torch.bfloat16)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "scale": options.scale,
        "is_10b": num_parameters == NUM_PARAMETERS,
        "parameters": num_parameters,
        **kernels(stage, device),
        "optimizer": name,
        "optimizer_bytes_a_parameter": round(held, 3),
        "peak_memory_gib": peak_memory / GIB,
        "peak_memory_of": of_what,
        **about,
        "seconds_a_step": seconds,
        "seconds_of_steps": times,
        "tokens_per_s": about["tokens"] / seconds,
        "images_per_s": about["images"] / seconds,
        "flops_a_step": flops,
        "flops_computed_twice": twice,
        "peak_flops": peak,
        "peak_from": peak_from,
        "mfu": flops / seconds / peak,
        "hardware_utilisation": (flops + twice) / seconds / peak,
        "losses": losses,
    }


def facts(batch: Batch) -> dict[str, Any]:
    """What the batch holds. Images are views: crops and global views."""
    sizes = batch.images.tensors if batch.images is not None else ()
    return {
        "documents": batch.num_tokens,
        "tokens": sum(batch.num_tokens),
        "padding": batch.num_padding,
        "labels": int((batch.labels != IGNORE_INDEX).sum()),
        "images": sum(len(pixels) for pixels in sizes),
        "images_by_side": {str(pixels.shape[-1]): len(pixels) for pixels in sizes},
    }


def kernels(stage: PretrainStage, device: torch.device) -> dict[str, str]:
    """Which kernels ran."""
    attention = str(stage.vlm.decoder.attention)
    if attention == NAME:
        attention += ": torch's varlen_attn" if has_varlen_kernel(device) else ": a loop over documents"
    liger = device.type == "cuda" and stage.loss.kernel != "chunked" and is_installed()
    return {"attention": attention, "cross_entropy": "liger" if liger else "chunked"}


def peak_memory_bytes(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), "tensors on the GPU"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "the whole process"


def main(args: Sequence[str] | None = None) -> int:
    try:
        options, overrides = read_options(sys.argv[1:] if args is None else args)
        found = measure(options, overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: the GPU has no room for the weights alone; give --layers (then it is not 10B)", file=sys.stderr)
        return 2
    for key, value in found.items():
        print(f"{key:28} {f'{value:,.4g}' if isinstance(value, float) else value}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
