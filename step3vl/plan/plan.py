"""A run's needs in one object: built from the composed configuration, printed as tables or as JSON."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from step3vl.callbacks.peak import PEAKS
from step3vl.config import ConfigError, nearest
from step3vl.models import VisionLanguageModel
from step3vl.optim import freeze_parameters

from .activations import Activations, measure
from .memory import RECOMPUTED, Memory, Sharding, activation_bytes, memory, sharding
from .parts import build_optimizer, build_vlm, optimizer_state
from .workload import Mean, Workload, workload

GPU_BYTES = {"A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9}
"""Memory by device name, from the makers' data sheets (SXM)."""
USABLE = 0.92
"""Share of it that tensors can fill: the rest is the context, NCCL's buffers and what the allocator cannot join."""


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes, seconds and FLOPs."""

    parameters: dict[str, int]
    """By part; the sum is the model."""
    trained: int
    sharding: Sharding
    memory: Memory
    work: Workload
    largest: dict[str, int]
    """Samples (or rows) of the largest micro-batch that fits, up to the run's own, under each setting of
    model.recompute; 0: none does."""
    recompute: str
    """The run's own setting."""
    max_steps: int
    gpu: str
    mfu: float
    checkpoint: int
    """Full state: weights as they are trained, and the optimizer's."""
    weights: int
    """An export in bf16."""
    assumed: tuple[str, ...]

    @property
    def seconds_per_step(self) -> float:
        return self.work.flops_per_step / (self.sharding.num_ranks * PEAKS[self.gpu] * self.mfu)

    @property
    def days(self) -> float:
        return self.max_steps * self.seconds_per_step / 86400

    @property
    def unit(self) -> str:
        """What a micro-batch is counted in."""
        return "rows" if self.work.is_counted_in_rows else "samples"

    def fits(self, recompute: str) -> bool:
        """Whether the run as it is fits under a setting of model.recompute."""
        return self.memory.peak(recompute) <= USABLE * GPU_BYTES[self.gpu]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        work = self.work
        peaks = {how: self.memory.peak(how) for how in RECOMPUTED}
        fits = {how: self.fits(how) for how in RECOMPUTED}
        cut = {**asdict(self.sharding), "computes_in": str(self.sharding.computes_in).removeprefix("torch.")}
        return {
            "parameters": {**self.parameters, "all": sum(self.parameters.values()), "trained": self.trained},
            "sharding": cut,
            "recompute": self.recompute,
            "memory": {**asdict(self.memory), "peak": peaks, "gpu": GPU_BYTES[self.gpu], "fits": fits},
            "largest_micro_batch": {"unit": self.unit, "configured": work.units_per_micro_batch, **self.largest},
            "sample": asdict(work.sample),
            "step": {
                "samples": work.samples_per_step,
                "tokens": work.tokens_per_step,
                "views": work.views_per_step,
                "flops": work.flops_per_step,
                "flops_per_token": work.flops_per_step / work.tokens_per_step,
                "seconds": self.seconds_per_step,
            },
            "run": {
                "gpu": self.gpu,
                "mfu": self.mfu,
                "tokens_per_second": work.tokens_per_step / self.seconds_per_step,
                "images_per_second": work.views_per_step / self.seconds_per_step,
                "max_steps": self.max_steps,
                "tokens": self.max_steps * work.tokens_per_step,
                "days": self.days,
                "gpu_hours": self.days * 24 * self.sharding.num_ranks,
            },
            "checkpoint": {"weights_bf16": self.weights, "full_state": self.checkpoint},
            "assumed": list(self.assumed),
        }


def make_plan(
    config: Mapping[str, Any],
    vlm: VisionLanguageModel,
    sample: Mean,
    assumed: tuple[str, ...],
    gpu: str = "H100",
    mfu: float = 0.4,
    kept: Activations | None = None,
) -> Plan:
    """The plan of a composed run whose mean sample is known; `vlm` is on the meta device, frozen as in training.

    Raises:
        ValueError: an unknown GPU, an MFU outside 0 to 1, no trainer.max_steps, or a part that cannot be measured.
    """
    if gpu not in GPU_BYTES:
        raise ConfigError(f"--gpu: no data sheet of {gpu!r}; {nearest(gpu, list(GPU_BYTES))}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu is a share between 0 and 1, got {mfu}")
    trainer, arguments = config["trainer"], config["model"]["init_args"]
    max_steps = int(trainer.get("max_steps") or -1)
    if max_steps < 1:
        raise ConfigError(f"trainer.max_steps is {trainer.get('max_steps')}; a plan needs a number of steps")
    precision = str(trainer.get("precision") or "bf16-mixed")
    cut = sharding(trainer, precision)
    kept = kept or measure(arguments["vlm"], precision, cut.computes_in)
    optimizer = build_optimizer(vlm, arguments)
    state = optimizer_state(vlm, optimizer)
    work = workload(config, cut.num_ranks, sample, assumed)
    need = memory(vlm, optimizer, state, cut, precision, kept, work)
    room = USABLE * GPU_BYTES[gpu] - need.fixed
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in vlm.named_children()}
    num = sum(p.numel() for p in vlm.parameters())
    trained = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    width = 2 if precision.endswith("16-true") else 4
    return Plan(
        parameters=parts,
        trained=trained,
        sharding=cut,
        memory=need,
        work=work,
        largest={how: largest(config, vlm, kept, work, room, how) for how in RECOMPUTED},
        recompute=str(arguments.get("recompute") or "none"),
        max_steps=max_steps,
        gpu=gpu,
        mfu=mfu,
        checkpoint=num * width + sum(state.values()),
        weights=2 * num,
        assumed=(*_words(precision, cut, optimizer, kept, gpu, mfu), *work.assumed),
    )


def largest(
    config: Mapping[str, Any],
    vlm: VisionLanguageModel,
    kept: Activations,
    work: Workload,
    room: float,
    recompute: str,
) -> int:
    """Samples or rows of the largest micro-batch, up to the configured one, whose activations take `room` bytes."""
    data = config["data"]["init_args"]
    key = "rows_per_step" if work.is_counted_in_rows else "samples_per_step"

    def needed(num: int) -> int:
        less = {**config, "data": {"init_args": {**data, key: num}}}
        return activation_bytes(vlm, kept, workload(less, 1, work.sample, ()), recompute)

    return bisect_right(range(1, work.units_per_micro_batch + 1), room, key=needed)


def prepare(config: Mapping[str, Any]) -> VisionLanguageModel:
    """The model of a composed run on the meta device, frozen as in training."""
    arguments = config["model"]["init_args"]
    if "vlm" not in arguments:
        name = str(config["model"]["class_path"]).rpartition(".")[2]
        raise ConfigError(f"plan: {name} trains no vision-language model; only stages with `model.vlm` can be planned")
    vlm = build_vlm(arguments["vlm"])
    freeze_parameters(vlm, arguments.get("freeze") or [])
    return vlm


def _words(precision: str, cut: Sharding, optimizer: Any, kept: Activations, gpu: str, mfu: float) -> tuple[str, ...]:
    words = [
        f"{cut.words}, {precision}, {type(optimizer).__name__}; its state is that of one step it took on shapes",
        f"{gpu}: {PEAKS[gpu] / 1e12:,.0f} TFLOP/s dense bf16 and {GPU_BYTES[gpu] / 1e9:.0f} GB by its data sheet, "
        f"of which tensors can fill {USABLE:.0%}; MFU {mfu:g} is a guess, recomputation not counted in it",
        "activations are what autograd keeps of a few tokens in one real block, on the CPU, times tokens and blocks; "
        "DeepStack's are left out",
    ]
    if precision.endswith("-mixed") and cut.computes_in == torch.float32:
        copies = sum(part.num_blocks * part.a_block for part in (kept.vision_encoder, kept.decoder))
        words.append(
            f"autocast keeps a 16-bit copy of every block's weights until its backward, {copies / 1e9:.1f} GB, unless "
            "blocks are recomputed; it is counted among the activations"
        )
    if cut.num_shards > 1:
        words.append("FSDP2 holds two whole blocks and a block's gradients at a time, and all that is in no block")
    if any(group.get("algorithm") == "muon" for group in optimizer.param_groups):
        words.append(
            "during its step Muon holds every matrix whole on each GPU, twice in fp32: the update and its direction"
        )
    return tuple(words)
