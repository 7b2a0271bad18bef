"""What will be trained on what: printed once, before the first step."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer


class StartTables(Callback):
    """Prints parameters by part, the optimizer's groups (peak LR, weight decay)."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        console = Console()
        places = f"{trainer.world_size} x {pl_module.device}, {torch.get_num_threads()} threads, {trainer.precision}"
        console.print(f"run folder {trainer.default_root_dir}; {places}", highlight=False)
        console.print(parts_table(getattr(pl_module, "vlm", pl_module)))
        for k, optimizer in enumerate(trainer.optimizers):
            console.print(groups_table(optimizer, "of the critic" if k else ""))


def parts_table(vlm: nn.Module) -> Table:
    """Parameters of each part of the model, and how many of them are trained."""
    table = Table(title="Model")
    for title in ("part", "class", "parameters", "trainable"):
        table.add_column(title, justify="left" if title in ("part", "class") else "right")
    total = [0, 0]
    for name, part in vlm.named_children():
        counts = [
            sum(p.numel() for p in part.parameters()),
            sum(p.numel() for p in part.parameters() if p.requires_grad),
        ]
        total = [a + b for a, b in zip(total, counts)]
        table.add_row(name, type(part).__name__, f"{counts[0]:,}", f"{counts[1]:,}")
    table.add_section()
    table.add_row("all", "", f"{total[0]:,}", f"{total[1]:,}")
    return table


def groups_table(optimizer: Optimizer, whose: str = "") -> Table:
    """Optimizer groups: the resolved learning rate at its peak and the weight decay each one really has."""
    table = Table(title=f"Optimizer groups {whose}".strip() + f" ({type(optimizer).__name__})")
    for title in ("group", "rule", "tensors", "parameters", "peak LR", "weight decay"):
        table.add_column(title, justify="left" if title in ("group", "rule") else "right")
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"])
        count = sum(p.numel() for p in group["params"])
        rule = group.get("algorithm", type(optimizer).__name__)
        row = (str(group.get("name", "default")), rule, str(len(group["params"])), f"{count:,}")
        table.add_row(*row, f"{rate:g}", f"{group['weight_decay']:g}")
    return table
