"""Memory of one GPU: what the strategy shards, what it gathers, what the forward keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from step3vl.losses.linear import BLOCK_BYTES, SMALL_CHUNK
from step3vl.models import VisionLanguageModel

from .activations import Activations
from .workload import Workload

GATHERED_BLOCKS = 2
"""The block at work and the one that is fetched meanwhile."""
RECOMPUTED = {"none": (), "vision": ("vision",), "decoder": ("decoder",), "blocks": ("vision", "decoder")}
"""Settings of model.recompute, and whose blocks they run again."""


@dataclass(frozen=True)
class Sharding:
    """Over how many ranks each parameter is cut, of how many."""

    num_ranks: int
    num_shards: int
    words: str
    computes_in: torch.dtype
    """Number format in which parameters are gathered, or else kept."""
    has_buckets: bool = False
    """Gradients are kept twice: by the parameters, and in the buckets that are summed over ranks."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. `gathered` and below are there from forward to backward only."""

    parameters: int
    gradients: int
    optimizer: int
    """State between steps."""
    optimizer_step: int
    """Beside it while a step is taken; activations are gone by then."""
    gathered: int
    """Whole blocks at work, and in backward their gradients."""
    root: int
    """What belongs to no block (embedding, output layer, projector), whole from forward to backward, with gradients."""
    logits: int
    activations: dict[str, int]
    """What a micro-batch keeps under each setting of model.recompute."""

    @property
    def state(self) -> int:
        """What stays on the GPU from step to step."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def fixed(self) -> int:
        """What a forward needs whatever the micro-batch."""
        return self.state + self.gathered + self.root + self.logits

    def peak(self, recompute: str) -> int:
        """The larger of the end of the forward and the optimizer's step."""
        return max(self.fixed + self.activations[recompute], self.state + self.optimizer_step)


def sharding(trainer: Mapping[str, Any], precision: str) -> Sharding:
    """How the composed trainer cuts parameters."""
    nodes = int(trainer.get("num_nodes") or 1)
    devices = trainer.get("devices", 1)
    devices = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    num_ranks = nodes * devices
    strategy = trainer.get("strategy") or "auto"
    name = strategy if isinstance(strategy, str) else str(strategy["class_path"]).rpartition(".")[2]
    arguments = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    kept_in = torch.bfloat16 if precision.endswith("16-true") else torch.float32
    if name in ("ShardedStrategy", "ModelParallelStrategy"):
        size = arguments.get("data_parallel_size", "auto")
        num = nodes if size in ("auto", None) else int(size)
        gathered = torch.bfloat16 if arguments.get("gather_dtype") == "bfloat16" else kept_in
        words = f"FSDP2 over {num} of {num_ranks} ranks, gathered in {str(gathered).removeprefix('torch.')}"
        return Sharding(num_ranks, num, words, gathered)
    if name.startswith(("fsdp", "FSDP")):
        mesh = arguments.get("device_mesh")
        num = int(mesh[-1]) if isinstance(mesh, list | tuple) else num_ranks
        return Sharding(num_ranks, num, f"FSDP over {num} of {num_ranks} ranks", kept_in)
    if num_ranks == 1:
        return Sharding(1, 1, "one rank", kept_in)
    doubled = not arguments.get("gradient_as_bucket_view")
    return Sharding(num_ranks, 1, f"each of {num_ranks} ranks holds everything", kept_in, doubled)


def memory(
    vlm: VisionLanguageModel,
    optimizer: Optimizer,
    state: Mapping[nn.Parameter, int],
    cut: Sharding,
    precision: str,
    kept: Activations,
    work: Workload,
) -> Memory:
    """Memory of a GPU for a model on the meta device; `state` is `optimizer_state` of it."""
    width = 2 if precision.endswith("16-true") else 4
    parameters = list(vlm.parameters())
    blocks = [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()]
    inside = {id(p) for block in blocks for p in block.parameters()}
    root = [p for p in parameters if id(p) not in inside]
    whole_width = cut.computes_in.itemsize
    gathered = root_bytes = 0
    if cut.num_shards > 1:
        largest = max(whole(list(block.parameters()), whole_width) for block in blocks)
        gathered = GATHERED_BLOCKS * largest + largest  # gradients of the block at work
        root_bytes = whole([*root, *(p for p in root if p.requires_grad)], whole_width)
    trained = [p for p in parameters if p.requires_grad]
    gradients = local(trained, cut.num_shards, width)
    return Memory(
        parameters=local(parameters, cut.num_shards, width),
        gradients=gradients * (2 if cut.has_buckets else 1),
        optimizer=sum(shard_numel(p, cut.num_shards) * (state[p] // p.numel()) for p in parameters),
        optimizer_step=step_bytes(optimizer, cut.num_shards),
        gathered=gathered,
        root=root_bytes,
        logits=logits_bytes(vlm, work, precision, cut.computes_in),
        activations={how: activation_bytes(vlm, kept, work, how) for how in RECOMPUTED},
    )


def shard_numel(parameter: nn.Parameter, num_shards: int) -> int:
    """Elements of the largest shard: FSDP2 cuts the first axis, the last rank getting what is left."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return math.ceil(rows / num_shards) * (parameter.numel() // max(1, rows))


def local(parameters: Sequence[nn.Parameter], num_shards: int, width: int) -> int:
    """Bytes of the largest shard."""
    return width * sum(shard_numel(p, num_shards) for p in parameters)


def whole(parameters: Sequence[nn.Parameter], width: int) -> int:
    """Bytes without sharding."""
    return width * sum(p.numel() for p in parameters)


def step_bytes(optimizer: Optimizer, num_shards: int) -> int:
    """What a step takes beside the state: AdamW a root of second moments; Muon whole matrices and their directions."""
    total = 0
    for group in optimizer.param_groups:
        if group.get("algorithm") == "muon":
            total += 2 * whole(group["params"], 4)
        else:
            copies = 2 if "algorithm" in group else 1  # denominators and updates; AdamW of torch: denominators
            total += copies * local(group["params"], num_shards, 4)
    return total


def logits_bytes(vlm: VisionLanguageModel, work: Workload, precision: str, computes_in: torch.dtype) -> int:
    """A chunk of our cross-entropy: logits and fp32 work, and of the output layer's size what 16 bits need besides."""
    vocab, width = vlm.decoder.vocab_size, vlm.decoder.hidden_size
    rows = min(max(width, SMALL_CHUNK // vocab), int(work.samples_per_micro_batch * work.sample.num_labels) + 1)
    low = 2 if precision.endswith("-mixed") else computes_in.itemsize
    besides = 0
    if low == 2:  # a 16-bit copy of fp32 weights or an fp32 sum of 16-bit gradients, and a 16-bit product
        besides = vocab * width * ((2 if computes_in == torch.float32 else 4) + 2)
    return rows * vocab * low + besides + min(BLOCK_BYTES["cuda"], rows * vocab * 4)


def activation_bytes(vlm: VisionLanguageModel, kept: Activations, work: Workload, recompute: str) -> int:
    """What one micro-batch keeps under a setting of model.recompute."""
    layout, patch = vlm.image_spec.layout, vlm.image_spec.patch_size
    prefix = vlm.vision_encoder.num_prefix
    patches = visual = 0.0
    views = work.sample.num_crops + work.sample.num_global_views
    limit = (
        1.0 if not work.max_views or not views else min(1.0, work.max_views / (views * work.samples_per_micro_batch))
    )
    for pixels, num in (
        (layout.crop_pixels, work.sample.num_crops),
        (layout.global_pixels, work.sample.num_global_views),
    ):
        num *= work.samples_per_micro_batch * limit
        patches += num * ((pixels // patch) ** 2 + prefix)
        visual += num * vlm.num_visual_tokens(pixels)
    total = kept.decoder.bytes(work.slots_per_micro_batch, "decoder" in RECOMPUTED[recompute])
    if patches:
        total += kept.vision_encoder.bytes(patches, "vision" in RECOMPUTED[recompute])
        total += visual * kept.projector.a_token
    return int(total)
