"""What a 10B step on one GPU needs beside the package: weights made in place, recomputation, lean optimizers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from step3vl.data import Processor
from step3vl.losses import CrossEntropy
from step3vl.models import VisionLanguageModel
from step3vl.optim import build_groups
from step3vl.stages import PretrainStage
from step3vl.types import Batch

OPTIMIZERS = {"adamw_fp32_moments": 12, "adamw_bf16": 8, "sgd": 4}
"""Bytes a parameter of weight, gradient and state: bf16 weights and gradients, and two moments, if any."""
NUMBERS: dict[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def build_stage(config: dict[str, Any]) -> PretrainStage:
    """The experiment's stage with its model on the meta device, and with the packaged tokenizer."""
    init = config["model"]["init_args"]
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--vlm", type=VisionLanguageModel)
    parser.add_argument("--processor", type=Processor)
    parser.add_argument("--loss", type=CrossEntropy | None, default=None)
    wanted = {key: init[key] for key in ("vlm", "processor", "loss") if key in init}
    wanted["processor"]["init_args"]["tokenizer"] = None
    with torch.device("meta"):
        built = parser.instantiate(parser.parse_object(wanted))
    stage = PretrainStage(built.vlm, built.processor, torch.optim.SGD, freeze=init.get("freeze", ()), loss=built.loss)
    stage.processor.bind(stage.vlm.image_spec, stage.vlm.projector.grid)
    stage.vlm.bind(stage.processor.image_token_id)
    return stage


def materialise(vlm: VisionLanguageModel, device: torch.device) -> None:
    """Give a model on the meta device memory and weights.

    Parameters are bf16. Buffers keep their format: rotary frequencies in bf16 would put far tokens in wrong places.
    """
    for module in vlm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device, dtype=torch.bfloat16)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))
    vlm.init_weights()


def recompute_blocks(vlm: VisionLanguageModel) -> None:
    """Keep the input of every block alone; backward runs the block's forward a second time."""
    for block in (*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def recomputed_flops(vlm: VisionLanguageModel, batch: Batch) -> float:
    """FLOPs of what `recompute_blocks` computes twice: all blocks, but not embeddings, projector or output layer.

    torch stops where it has all that backward needs, so the last product of a Qwen3 layer, down_proj, is not repeated.
    """
    encoder, decoder = vlm.vision_encoder, vlm.decoder
    patch, width = encoder.image_spec.patch_size, encoder.hidden_size
    last = sum(weight.numel() for name, weight in decoder.named_parameters() if name.endswith("down_proj.weight"))
    total = sum(decoder.flops(length) - 2 * length * last for length in batch.num_tokens)
    for pixels in batch.images.tensors if batch.images is not None else ():
        cells = [side // patch for side in pixels.shape[-2:]]
        embedding = 2 * cells[0] * cells[1] * width * 3 * patch**2
        total += len(pixels) * (encoder.flops(*cells) - embedding)
    return total


class AdamWFp32Moments(Optimizer):
    """AdamW on bf16 weights with fp32 moments and no fp32 copy of the weights: 12 bytes a parameter with gradients.

    Works through 2^26 numbers at a time, so that what it needs beside the state stays small.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        flat = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
        for weight, grad, first, second in zip(*(tensor.reshape(-1).split(2**26) for tensor in flat)):
            grad = grad.float()
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            spread = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            value = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
            weight.copy_(value.addcdiv_(first, spread, value=-group["lr"] / (1 - beta1 ** state["step"])))


def make_optimizer(name: str, vlm: VisionLanguageModel) -> Optimizer:
    """One of OPTIMIZERS, for the groups of a real run."""
    groups = build_groups(vlm)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=NUMBERS["lr"], fused=True)
    if name == "adamw_bf16":
        return torch.optim.AdamW(groups, fused=True, **NUMBERS)
    return AdamWFp32Moments(groups, **NUMBERS)


def bytes_a_parameter(optimizer: Optimizer) -> float:
    """Measured: weights, gradients and state of the optimizer, over the number of weights."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    held = [*weights, *(p.grad for p in weights if p.grad is not None)]
    held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in held) / sum(p.numel() for p in weights)
