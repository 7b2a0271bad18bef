"""Muon for hidden matrices and AdamW for the rest, as one Optimizer (Table 5; Moonlight's update-RMS matching).

One class, because Lightning's automatic optimization, its schedulers and its checkpoints expect one optimizer. State is
fp32; 16-bit parameters get an fp32 copy there, on which steps are taken, so that small steps are not rounded away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from .groups import near_names
from .newton_schulz import orthogonalise

ADAMW_PATTERNS = ("embed", "lm_head", "value_head", "positional_embedding", "_token")
FORMATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FUSED_PATTERNS = {r"in_proj_weight$": 3}


class MuonAdamW(Optimizer):
    """Each incoming group is split in two: 2-D weights whose name matches no `adamw_pattern` go to Muon.

    A matrix with a single row or column has no directions to balance and goes to AdamW, whatever its name.

    Args:
        params: groups of (name, parameter); names decide who gets Muon, so plain parameters are refused.
        lr: step size; Muon's update is scaled by 0.2 sqrt(max(rows, columns)) so that its RMS matches AdamW's.
        adamw_lr: step size of the AdamW part; None: `lr`.
        weight_decay: decoupled decay of both parts.
        momentum: of Muon, with Nesterov look-ahead.
        betas, eps: of AdamW.
        ns_steps: Newton-Schulz iterations.
        adamw_patterns: names (regular expressions) that stay with AdamW although they are matrices; one that is not
            among the defaults must match.
        fused_patterns: matrices that hold several maps stacked by rows (pattern -> how many), orthogonalised apart;
            None: PE-lang's in_proj_weight, 3.
        flatten_convs: treat a convolution kernel as the matrix (out, in x height x width); False: AdamW takes it.
        ns_dtype: number format of the iterations. bfloat16 is the reference's; float32 tells a mistake from rounding.
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
        adamw_patterns: tuple[str, ...] = ADAMW_PATTERNS,
        fused_patterns: dict[str, int] | None = None,
        flatten_convs: bool = False,
        ns_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ):
        if lr <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"MuonAdamW needs lr > 0 and 0 <= momentum < 1, got lr={lr}, momentum={momentum}")
        if ns_dtype not in FORMATS:
            raise ValueError(f"ns_dtype is {ns_dtype!r}; accepted are {' and '.join(map(repr, FORMATS))}")
        fused = FUSED_PATTERNS if fused_patterns is None else fused_patterns
        groups = []
        names: list[str] = []
        for group in params:
            if not isinstance(group, dict) or not all(isinstance(item, tuple) for item in group["params"]):
                raise ValueError("MuonAdamW needs groups of (name, parameter) pairs: names decide who gets Muon")
            pairs = group["params"]
            names += [n for n, _ in pairs]
            muon = [(n, p) for n, p in pairs if _is_matrix(p, flatten_convs) and not _first(adamw_patterns, n)]
            chosen = {n for n, _ in muon}
            rest = [(n, p) for n, p in pairs if n not in chosen]
            if muon:
                parts = [_num_parts(n, p, fused) for n, p in muon]
                groups.append({**group, "params": muon, "algorithm": "muon", "num_parts": parts})
            if rest:
                own = {"lr": adamw_lr} if adamw_lr is not None and "lr" not in group else {}
                groups.append({**group, **own, "params": rest, "algorithm": "adamw", "num_parts": [1] * len(rest)})
        for key, given, usual in (("adamw", adamw_patterns, ADAMW_PATTERNS), ("fused", fused, FUSED_PATTERNS)):
            for pattern in given:
                if pattern not in usual and not any(re.search(pattern, name) for name in names):
                    raise ValueError(f"{key}_patterns: {pattern!r} matches no parameter; {near_names(pattern, names)}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "ns_steps": ns_steps, "ns_dtype": ns_dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._muon if group["algorithm"] == "muon" else self._adamw)(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the state stays fp32: torch gives it the format of the parameters, and would round it."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, ours):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and self.state[parameter][name].dtype != torch.float32:
                    self.state[parameter][name] = value.to(parameter.device, torch.float32)

    def _values(self, parameter: Tensor) -> Tensor:
        """What steps are taken on: the parameter, or the fp32 copy of a 16-bit one."""
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().float()
        return state["master"]

    def _muon(self, group: dict) -> None:
        """Sharded gradients are gathered once a matrix; each rank orthogonalises the whole and keeps its own rows."""
        by_shape: dict[tuple, list[tuple[int, Tensor]]] = {}  # equal shapes share one batched Newton-Schulz
        parameters = [p for p in group["params"] if p.grad is not None]
        counts = [n for p, n in zip(group["params"], group["num_parts"]) if p.grad is not None]
        for number, (parameter, num_parts) in enumerate(zip(parameters, counts)):
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad.float(), 1 - group["momentum"])
            update = torch.lerp(parameter.grad.float(), buffer, group["momentum"])  # Nesterov
            whole = update.full_tensor() if isinstance(update, DTensor) else update
            for piece in whole.flatten(1).chunk(num_parts):  # [R,C]
                by_shape.setdefault(tuple(piece.shape), []).append((number, piece))
        directions: list[list[Tensor]] = [[] for _ in parameters]
        for pieces in by_shape.values():
            dtype = FORMATS[group.get("ns_dtype", "bfloat16")]
            found = orthogonalise(torch.stack([piece for _, piece in pieces]), group["ns_steps"], dtype)  # [m,R,C]
            for (number, _), direction in zip(pieces, found):
                directions[number].append(direction)
        for parameter, parts in zip(parameters, directions):
            values = self._values(parameter)
            scale = group["lr"] * 0.2 * max(parts[0].shape) ** 0.5
            step = torch.cat(parts).view(parameter.shape).to(values.dtype)
            if isinstance(parameter, DTensor):
                step = distribute_tensor(step, parameter.device_mesh, parameter.placements, src_data_rank=None)
            values.mul_(1 - group["lr"] * group["weight_decay"])
            values.sub_(step, alpha=scale)
            if values is not parameter:
                parameter.copy_(values)

    def _adamw(self, group: dict) -> None:
        grads, params, firsts, seconds, steps = [], [], [], [], []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] += 1
            params.append(parameter)
            grads.append(parameter.grad.float())
            firsts.append(state["exp_avg"])
            seconds.append(state["exp_avg_sq"])
            steps.append(float(state["step"]))
        if not params:
            return
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(firsts, grads, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - beta2)
        denominators = torch._foreach_div(seconds, [1 - beta2**t for t in steps])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(firsts, denominators)
        values = [self._values(parameter) for parameter in params]
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        for parameter, value, update, t in zip(params, values, updates, steps):
            value.sub_(update.to(value.dtype), alpha=group["lr"] / (1 - beta1**t))
            if value is not parameter:
                parameter.copy_(value)


def _is_matrix(parameter: Tensor, flatten_convs: bool) -> bool:
    """Whether Muon applies to the shape: two axes (or a kernel's four), and more than one row and column."""
    if parameter.ndim != 2 and not (flatten_convs and parameter.ndim == 4):
        return False
    return len(parameter) > 1 and parameter.shape[1:].numel() > 1


def _num_parts(name: str, parameter: Tensor, fused: dict[str, int]) -> int:
    pattern = _first(fused, name)
    if pattern is None:
        return 1
    if fused[pattern] < 1 or len(parameter) % fused[pattern]:
        raise ValueError(
            f"fused_patterns: {pattern!r} says {fused[pattern]} maps, but {name} has {len(parameter)} rows"
        )
    return fused[pattern]


def _first(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)
