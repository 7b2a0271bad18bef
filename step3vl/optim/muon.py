"""Muon for hidden matrices and AdamW for the rest, as one Optimizer (Table 5; Moonlight's update-RMS matching).

One class, because Lightning's automatic optimization, its schedulers and its checkpoints expect one optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the Muon reference


class MuonAdamW(Optimizer):
    """Each incoming group is split in two: 2-D weights whose name matches no `adamw_pattern` go to Muon.

    Args:
        params: groups of (name, parameter); names decide who gets Muon, so plain parameters are refused.
        lr: step size; Muon's update is scaled by 0.2 sqrt(max(rows, columns)) so that its RMS matches AdamW's.
        adamw_lr: step size of the AdamW part; None: `lr`.
        weight_decay: decoupled decay of both parts.
        momentum: of Muon, with Nesterov look-ahead.
        betas, eps: of AdamW.
        ns_steps: Newton-Schulz iterations.
        adamw_patterns: names (regular expressions) that stay with AdamW although they are matrices.
        fused_patterns: matrices that hold several maps stacked by rows (pattern -> how many), orthogonalised apart.
        flatten_convs: treat a convolution kernel as the matrix (out, in x height x width); False: AdamW takes it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_steps: int = 5,
        adamw_patterns: tuple[str, ...] = ("embed", "lm_head", "positional_embedding", "_token"),
        fused_patterns: dict[str, int] | None = None,
        flatten_convs: bool = False,
    ):
        if lr <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"MuonAdamW needs lr > 0 and 0 <= momentum < 1, got lr={lr}, momentum={momentum}")
        fused = {r"in_proj_weight$": 3} if fused_patterns is None else fused_patterns
        groups = []
        for group in params:
            if not isinstance(group, dict) or not all(isinstance(item, tuple) for item in group["params"]):
                raise ValueError("MuonAdamW needs groups of (name, parameter) pairs: names decide who gets Muon")
            matrices = [(n, p) for n, p in group["params"] if p.ndim == 2 or (flatten_convs and p.ndim == 4)]
            muon = [(n, p) for n, p in matrices if not any(re.search(pattern, n) for pattern in adamw_patterns)]
            names = {n for n, _ in muon}
            rest = [(n, p) for n, p in group["params"] if n not in names]
            if muon:
                parts = [next((k for f, k in fused.items() if re.search(f, n)), 1) for n, _ in muon]
                groups.append({**group, "params": muon, "algorithm": "muon", "num_parts": parts})
            if rest:
                own = {"lr": adamw_lr} if adamw_lr is not None and "lr" not in group else {}
                groups.append({**group, **own, "params": rest, "algorithm": "adamw", "num_parts": [1] * len(rest)})
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "ns_steps": ns_steps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["algorithm"] == "muon" else self._adamw)(group)
        return loss

    def _muon(self, group: dict) -> None:
        """Sharded gradients are gathered once a matrix; each rank orthogonalises the whole and keeps its own rows."""
        by_shape: dict[tuple, list[tuple[int, Tensor]]] = {}  # equal shapes share one batched Newton-Schulz
        parameters = [p for p in group["params"] if p.grad is not None]
        counts = [n for p, n in zip(group["params"], group["num_parts"]) if p.grad is not None]
        for number, (parameter, num_parts) in enumerate(zip(parameters, counts)):
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad.float(), 1 - group["momentum"])
            update = torch.lerp(parameter.grad.float(), buffer, group["momentum"])  # Nesterov
            whole = update.full_tensor() if isinstance(update, DTensor) else update
            for piece in whole.flatten(1).chunk(num_parts):  # [R,C]
                by_shape.setdefault(tuple(piece.shape), []).append((number, piece))
        directions: list[list[Tensor]] = [[] for _ in parameters]
        for pieces in by_shape.values():
            found = orthogonalise(torch.stack([piece for _, piece in pieces]), group["ns_steps"])  # [m,R,C]
            for (number, _), direction in zip(pieces, found):
                directions[number].append(direction)
        for parameter, parts in zip(parameters, directions):
            scale = group["lr"] * 0.2 * max(parts[0].shape) ** 0.5
            step = torch.cat(parts).view(parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                step = distribute_tensor(step, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(step, alpha=scale)

    def _adamw(self, group: dict) -> None:
        grads, params, firsts, seconds = [], [], [], []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] += 1
            params.append(parameter)
            grads.append(parameter.grad.float())
            firsts.append(state["exp_avg"])
            seconds.append(state["exp_avg_sq"])
        if not params:
            return
        beta1, beta2 = group["betas"]
        steps = [float(self.state[p]["step"]) for p in params]
        torch._foreach_lerp_(firsts, grads, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - beta2)
        denominators = torch._foreach_div(seconds, [1 - beta2**t for t in steps])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(firsts, denominators)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for parameter, update, t in zip(params, updates, steps):
            parameter.sub_(update.to(parameter.dtype), alpha=group["lr"] / (1 - beta1**t))


def orthogonalise(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """[m,R,C] -> [m,R,C] with singular values near 1, by Newton-Schulz in bf16. A zero matrix stays zero."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).float()
