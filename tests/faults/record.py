"""What a rank did in each step, in a form that shows a single changed bit."""

import json
import random
from pathlib import Path

import numpy as np
import torch
import xxhash
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from step3vl.callbacks.checkpoints import random_state


class Record(Callback):
    """Appends a line a step to `steps-RANK.jsonl`: samples, loss, and digests of all that a checkpoint must hold.

    Draws random numbers in every step, so that a run that does not go on with them is found out. A line is in the file
    before the step is saved.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn = [torch.rand(()).item(), random.random(), np.random.rand()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        moments = [state[key] for _, state in sorted(optimizer.state_dict()["state"].items()) for key in sorted(state)]
        line = {
            "step": trainer.global_step,
            "loss": float(outputs["loss"]).hex(),
            "logged": float(trainer.callback_metrics["loss"]).hex(),
            "ids": batch.sample_ids,
            "drawn": self.drawn,
            "weights": digest(pl_module.state_dict().values()),
            "moments": digest(moments),
            "random": digest(flat(random_state())),
            "data": digest([json.dumps(trainer.train_dataloader.state_dict(), sort_keys=True)]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"steps-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def digest(values) -> str:
    """One checksum of tensors (own shards) and numbers in order."""
    checksum = xxhash.xxh3_64()
    for value in values:
        if isinstance(value, torch.Tensor):
            own = value.to_local() if isinstance(value, DTensor) else value
            checksum.update(own.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            checksum.update(repr(value).encode())
    return checksum.hexdigest()


def flat(value):
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in flat(value[key])]
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, list) else [value]


def read(folder, rank: int = 0) -> list[dict]:
    """The whole lines of a rank, in the order in which they were written; a killed run may leave a half one."""
    file = Path(folder) / f"steps-{rank}.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [line for line in text.split("\n") if line.endswith("}")]
    return [json.loads(line) for line in lines]


def by_step(folder, rank: int = 0) -> dict[int, dict]:
    """The lines by step. A step that was taken twice must have come out the same, bit for bit."""
    found: dict[int, dict] = {}
    for line in read(folder, rank):
        before = found.setdefault(line["step"], line)
        changed = [key for key in line if line[key] != before[key]]
        assert not changed, f"{folder}: step {line['step']} was taken twice, and differs in {changed}"
    return found
