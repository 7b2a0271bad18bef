"""A run that is told to end saves itself at the next step, and goes on later where it stopped (docs/slurm.md).

SLURM sends SIGUSR1 some time before a job's limit (`--signal=USR1@300`) and SIGTERM before it takes a job away.
Nothing is saved inside a signal handler: Lightning's own requeueing does so, and can hang or store a torn state.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from step3vl.callbacks.checkpoints import Checkpoints
from step3vl.signals import EXIT_UNFINISHED, SignalNote, shield_forks
from step3vl.stages.guard import Rewind

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SCONTROL_S = 60
"""Seconds that SLURM has to answer."""


class Requeue(Callback):
    """On SIGUSR1 or SIGTERM to any rank: save after the step in progress, stop, exit with status 85.

    After SIGUSR1 a SLURM job is also put back into the queue (`scontrol requeue`); SIGTERM comes from `scancel`, which
    means the end, or from preemption, after which SLURM requeues by itself. Start runs with --ckpt_path=last, so that
    the same command begins and goes on. More signals change nothing. A validation in progress is finished first.

    Stands before the checkpoint callback in `trainer.callbacks` and after those that count something.

    Args:
        every_n_steps: optimizer steps between two times that ranks ask each other; more saves a small all-reduce.
    """

    def __init__(self, every_n_steps: int = 1):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.note = SignalNote(SIGNALS)
        self.is_saved = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not any(isinstance(callback, Checkpoints) for callback in trainer.checkpoint_callbacks):
            raise ValueError(
                "step3vl.callbacks.Requeue has nothing to save with: trainer.callbacks also needs "
                "step3vl.callbacks.Checkpoints"
            )
        # Lightning's handlers save, and talk to other ranks, at whatever instant a signal comes: they stay out
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        self.is_saved = False
        self.note.install()
        shield_forks(SIGNALS)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not is_step or trainer.global_step % self.every_n_steps:
            return  # between two optimizer steps gradients are half summed, and no checkpoint holds them
        if not trainer.strategy.reduce_boolean_decision(bool(self.note.seen), all=False):
            return
        save(trainer)
        self.is_saved = trainer.max_steps < 0 or trainer.global_step < trainer.max_steps  # the last step ends by itself

    # Whatever comes next after the step has been logged:

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Rewind) and trainer.is_global_zero and job_id() is not None:
            print(requeue(), flush=True)
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(trainer)

    # ------------------------------------------------------------------------------------------------ inside

    def _leave(self, trainer: Trainer) -> None:
        """When saved: let every write end, requeue, stop with SystemExit."""
        if not self.is_saved:
            return
        wants_requeue = trainer.strategy.reduce_boolean_decision(signal.SIGUSR1 in self.note.seen, all=False)
        trainer.strategy.checkpoint_io.teardown()  # waits for a save in the background
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier("requeue")
        if trainer.is_global_zero:
            name = "SIGUSR1" if wants_requeue else "SIGTERM"
            print(f"{name}: saved after step {trainer.global_step} in {trainer.default_root_dir}", flush=True)
            print(requeue() if wants_requeue else "the same command with --ckpt_path=last goes on", flush=True)
        trainer.strategy.barrier("requeued")  # a rank that ended before the job is requeued may take the job with it
        raise SystemExit(EXIT_UNFINISHED)

    def _restore(self, trainer: Trainer) -> None:
        self.note.restore()
        shield_forks(())
        vars(trainer._signal_connector).pop("register_signal_handlers", None)


def _nothing() -> None:
    """In place of Lightning's registration of signal handlers."""


def save(trainer: Trainer) -> None:
    """Save through the trainer's own callback, so that --ckpt_path=last finds it."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints):
            callback.save(trainer)


def requeue() -> str:
    """Put this SLURM job, or this element of an array, back into the queue; a sentence about how that went."""
    job = job_id()
    if job is None:
        return "not a SLURM job; the same command with --ckpt_path=last goes on"
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued ({error}); submit it again"
    if done.returncode:
        return f"job {job} could not be requeued ({done.stderr.strip() or done.returncode}); submit it again"
    return f"job {job} is requeued"


def job_id() -> str | None:
    """SLURM's name of the job that this process belongs to; None outside SLURM."""
    array, element = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{element}" if array and element else os.environ.get("SLURM_JOB_ID")
