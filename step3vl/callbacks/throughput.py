"""Speed, waste and the mixture that was really seen, logged every few steps over all ranks."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from step3vl.callbacks.peak import peak_flops
from step3vl.types import IGNORE_INDEX, Batch

WINDOW_ROWS = 1000
"""Packed rows over which the mixture's shares are measured."""


class Throughput(Callback):
    """Logs, over all ranks since the last log:

    tokens/s: tokens of samples (padding excluded) through the model, over wall time including data and logging.
    images/s: views (crops and global views) through the encoder.
    mfu: model FLOPs utilisation: FLOPs of the matrix products of forward and backward (tower, projector, decoder,
        output layer of learnt tokens; `step3vl.models.flops`) over wall time and the devices' peak. The peak is the
        data sheet's on known GPUs, else what a plain matrix product reaches when the run starts. On GPUs 0.4 to 0.5
        is good.
    data_wait: share of wall time spent waiting for the next batch. Above 0.05 add workers.
    supervised: share of tokens that carry a label. Under 5 % most compute teaches nothing.
    packing: share of token slots that hold a sample. Under 0.9 the rows are too long or the samples too few.
    imbalance: largest over mean FLOPs of the ranks in a step. Above 1.1 set data.balance.
    tokens: tokens of samples since the start of the run; tokens/NAME: those of one source.
    mixture_off: largest distance of a source's share from its weight, over the last 1,000 packed rows. 0.01 is 1 %.
    cpu_s: process CPU seconds since the start of the run; on shared machines the honest clock.

    Args:
        every_n_steps: optimizer steps between logs.
        peak_tflops: peak of one device in TFLOP/s; None: looked up or measured.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None):
        self.every_n_steps, self.peak_tflops = every_n_steps, peak_tflops
        self.num_tokens_seen = 0
        self.num_images_seen = 0
        self.source_tokens: dict[str, int] = {}
        self.window: deque[tuple[int, list[float]]] = deque()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vlm = getattr(pl_module, "vlm", None)
        self.flops = None if vlm is None else vlm.flops()
        peak, where = self._peak(pl_module)
        self.peak = peak * trainer.world_size
        pl_module.print(f"peak of a device: {peak / 1e12:.3g} TFLOP/s ({where})")
        mixture = getattr(getattr(trainer, "datamodule", None), "mixture", None)
        self.unit = "tokens" if mixture is None else mixture.unit
        self.shares: dict[str, float] = {} if mixture is None else mixture.shares()
        self.source_tokens = {name: self.source_tokens.get(name, 0) for name in self.shares}
        self.cpu_start_s = time.process_time()
        self.last_step = trainer.global_step
        self.reset()

    def _peak(self, pl_module: LightningModule) -> tuple[float, str]:
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12, "given"
        dtype = torch.bfloat16 if str(pl_module.trainer.precision).startswith("bf16") else torch.float32
        return peak_flops(pl_module.device, dtype)

    def reset(self) -> None:
        self.start_s = self.batch_end_s = time.perf_counter()
        self.wait_s = 0.0
        self.num_slots = self.num_tokens = self.num_views = self.num_rows = 0
        self.flops_of_steps: list[float] = []  # without the output layer
        self.labels_of_steps: list[Tensor] = []  # scalars left on the device, so that no step waits for it
        self.drawn = {name: [0, 0] for name in self.shares}  # tokens, samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, i: int) -> None:
        self.wait_s += time.perf_counter() - self.batch_end_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self.num_slots += batch.input_ids.numel()
        self.num_tokens += batch.input_ids.numel() - batch.num_padding
        self.num_views += len(batch.images) if batch.images else 0
        self.num_rows += len(batch.input_ids)
        self.labels_of_steps.append((batch.labels != IGNORE_INDEX).sum())
        self.flops_of_steps.append(0.0 if self.flops is None else self.flops.batch(batch, 0))
        for name, num_tokens in zip(batch.sources, batch.num_tokens):
            if name in self.drawn:
                self.drawn[name][0] += num_tokens
                self.drawn[name][1] += 1
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self.last_step:
            self.last_step = trainer.global_step
            self.publish(trainer, pl_module)
        self.batch_end_s = time.perf_counter()

    def publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the counts over ranks, log, and begin anew."""
        seconds = max(time.perf_counter() - self.start_s, 1e-9)
        num_labels = torch.stack(self.labels_of_steps).tolist()
        steps = self.flops_of_steps
        if self.flops is not None:
            steps = [flops + self.flops.text(0, n) for flops, n in zip(steps, num_labels)]
        counts = [self.num_slots, self.num_tokens, sum(num_labels), self.num_views, self.num_rows]
        sums = [*counts, sum(steps), self.wait_s, *(n for pair in self.drawn.values() for n in pair)]
        slots, tokens, labels, views, rows, flops, wait_s, *drawn = over_ranks(sums, "SUM", trainer)
        self.num_tokens_seen += int(tokens)
        self.num_images_seen += int(views)
        pl_module.log("tokens/s", tokens / seconds, prog_bar=True)
        pl_module.log("supervised", labels / max(1, tokens), prog_bar=True)
        pl_module.log("packing", tokens / max(1, slots), prog_bar=True)
        pl_module.log("images/s", views / seconds)
        pl_module.log("data_wait", wait_s / trainer.world_size / seconds)
        if self.flops is not None:
            pl_module.log("mfu", flops / seconds / self.peak, prog_bar=True)
            if trainer.world_size > 1:
                worst = sum(over_ranks(steps, "MAX", trainer))
                pl_module.log("imbalance", worst * trainer.world_size / max(1.0, flops))
        pl_module.log("cpu_s", time.process_time() - self.cpu_start_s)
        pl_module.log("tokens", float(self.num_tokens_seen))
        for name, num_tokens in zip(self.shares, drawn[::2]):
            self.source_tokens[name] += int(num_tokens)
            pl_module.log(f"tokens/{name}", float(self.source_tokens[name]))
        if self.shares:
            self.window.append((int(rows), drawn[::2] if self.unit == "tokens" else drawn[1::2]))
            while sum(n for n, _ in self.window) - self.window[0][0] >= WINDOW_ROWS:
                self.window.popleft()
            pl_module.log("mixture_off", self.mixture_off())
        self.reset()

    def mixture_off(self) -> float:
        """Largest distance of a source's share from its weight, over the window."""
        totals = [sum(column) for column in zip(*(counts for _, counts in self.window))]
        whole = max(1.0, sum(totals))
        return max(abs(found / whole - share) for found, share in zip(totals, self.shares.values()))

    def state_dict(self) -> dict[str, Any]:
        seen = {"num_tokens_seen": self.num_tokens_seen, "num_images_seen": self.num_images_seen}
        return {**seen, "source_tokens": dict(self.source_tokens), "window": [list(entry) for entry in self.window]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_tokens_seen, self.num_images_seen = state_dict["num_tokens_seen"], state_dict["num_images_seen"]
        self.source_tokens = dict(state_dict["source_tokens"])
        self.window = deque((int(rows), list(counts)) for rows, counts in state_dict["window"])


def over_ranks(values: list[float], operation: str, trainer: Trainer) -> list[float]:
    """Element-wise SUM or MAX of equally long lists, one a rank."""
    if trainer.world_size == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(total, op=getattr(torch.distributed.ReduceOp, operation))
    return total.tolist()
