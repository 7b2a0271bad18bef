"""When a run saves itself, which of its checkpoints it keeps, and that random numbers go on after a resume."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import FSDPStrategy

from step3vl.saving import RunCheckpointIO
from step3vl.saving.writer import prune
from step3vl.weights.runs import FOLDER, saved_steps, step_name, step_of


class Checkpoints(Checkpoint):
    """Saves every so many steps, and at the end, to `checkpoints/step-N` in the run's folder.

    A checkpoint is written whole or not at all (`step3vl.saving`), and can be read on any number of ranks. A run that
    begins anew puts checkpoints of an earlier run in its folder aside, to checkpoints.1, and says so; one that goes on
    from an earlier checkpoint, or from one before a damaged one, does so with those that came after it.

    Args:
        every_n_steps: optimizer steps between saves.
        keep_last: newest checkpoints that are kept; two, so that a damaged one is not the only one.
        keep_every: also keep for ever those whose step is a multiple of this; null: none.
        asynchronous: write in the background, from a copy in main memory of what this rank holds.
    """

    def __init__(
        self, every_n_steps: int, keep_last: int = 2, keep_every: int | None = None, asynchronous: bool = False
    ):
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if keep_every is not None and keep_every % every_n_steps:
            raise ValueError(f"keep_every is {keep_every}, which is no multiple of every_n_steps, {every_n_steps}")
        self.every_n_steps, self.keep_last, self.keep_every = every_n_steps, keep_last, keep_every
        self.asynchronous = asynchronous
        self.folder: Path | None = None
        self.last_step = 0
        self._states: list[dict[str, Any]] = []  # of the ranks' random numbers, as loaded

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "step3vl.callbacks.Checkpoints cannot save under FSDPStrategy, which flattens parameters; use "
                "strategy/fsdp2.yaml, or lightning.pytorch.callbacks.ModelCheckpoint"
            )
        trainer.strategy.checkpoint_io = RunCheckpointIO(self.asynchronous)
        self.folder = Path(trainer.default_root_dir) / FOLDER

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_step = trainer.global_step
        if trainer.is_global_zero and self.folder is not None:
            path = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
            is_own = path is not None and self.folder.resolve() in (path, path.parent, path / FOLDER)
            put_aside(self.folder, after=trainer.global_step if is_own else None)
        if trainer.global_rank < len(self._states):
            first = GoOn(self._states[trainer.global_rank])
            trainer.callbacks = [first, *trainer.callbacks]  # type: ignore[attr-defined]
        self._states = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        trainer.strategy.checkpoint_io.teardown()
        trainer.strategy.barrier("checkpoints")  # what follows may read what the first rank has written

    def save(self, trainer: Trainer) -> None:
        """Save after the step in progress, unless that was done already; called by all ranks."""
        if trainer.global_step == self.last_step or self.folder is None:
            return  # also between the micro-batches of a step
        self.last_step = trainer.global_step
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, RunCheckpointIO)
        folder = self.folder
        io.writer.done = lambda: prune(folder, self.keep_last, self.keep_every)
        trainer.save_checkpoint(folder / step_name(trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        states = [random_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = states * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, random_state())
        return {"random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._states = state_dict["random"]


class GoOn(Callback):
    """Sets random numbers when the first batch begins, before other callbacks draw any.

    Not earlier, as setting up has drawn numbers that the uninterrupted run drew long ago.
    """

    def __init__(self, state: dict[str, Any]):
        self.state: dict[str, Any] | None = state

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.state is not None:
            set_random_state(self.state)
            self.state = None


def random_state() -> dict[str, Any]:
    """The state of torch's, Python's and NumPy's random numbers on this rank, as tensors and plain numbers."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, words, *rest = numpy_state
    state = {"torch": torch.get_rng_state(), "python": [version, torch.tensor(numbers), gauss]}
    state["numpy"] = [kind, torch.from_numpy(words.astype(np.int64)), *rest]
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        kind, words, *rest = state["numpy"]
        np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def put_aside(folder: Path, after: int | None = None) -> None:
    """Move checkpoints of another run, or of steps that this one takes anew, so that nothing goes on from them.

    Args:
        folder: a run's folder of checkpoints.
        after: keep those up to this step; None: none.
    """
    found = [path for path in saved_steps(folder) if after is None or (step_of(path) or 0) > after]
    if not found:
        return
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{FOLDER}.{n}").exists())
    target = folder.with_name(f"{FOLDER}.{number}")
    target.mkdir()
    for path in found:
        os.rename(path, target / path.name)
    some = "1 checkpoint" if len(found) == 1 else f"{len(found)} checkpoints"
    if after is None:
        print(
            f"{folder} held {some} of an earlier run, up to {found[0].name}; they are in {target.name} now "
            "(--ckpt_path=last goes on from the newest instead)"
        )
    else:
        print(f"{folder} held {some} after step {after}, from which this run goes on; they are in {target.name} now")
