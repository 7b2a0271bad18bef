"""What stands between a bad step and the weights: steps that are not finite, or stand out, are refused by all ranks."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, stdev
from typing import Any

from lightning.pytorch import Trainer

from step3vl.data.left_out import leave_out, read_left_out
from step3vl.data.loader import ResumableLoader
from step3vl.signals import EXIT_UNFINISHED


class Rewind(SystemExit):
    """The run ends, to go on from its newest checkpoint without the data of the refused steps."""


class Diverged(ValueError):
    """Too many steps were refused in a row; the run ends, and its last checkpoint is from before them."""


class Guard:
    """Judges each step by its loss and the norm of its gradient, before the weights are touched.

    A refused step changes neither parameters nor moments; the learning-rate schedule goes on. A run that is refused
    `stop_after` times in a row ends.

    Args:
        stop_after: refused steps in a row that end the run.
        spike_sigmas: refuse a step whose loss lies more than this many standard deviations above the mean of the last
            ones; None: only what is not finite is refused. 6 gives no false alarm on noise.
        window: accepted steps that mean and deviation are taken over; until half of them are there, nothing is a spike.
        max_rewinds: how often a run may end with status 85 in place of an error, so that the same command, or a
            requeued job, goes on from the newest checkpoint and leaves the data of the refused steps out.
    """

    def __init__(self, stop_after: int = 5, spike_sigmas: float | None = None, window: int = 128, max_rewinds: int = 0):
        if stop_after < 1 or window < 4:
            raise ValueError(f"guard: stop_after must be at least 1 and window at least 4, got {stop_after}, {window}")
        if spike_sigmas is not None and spike_sigmas <= 0:
            raise ValueError(f"guard: spike_sigmas must be above 0 or null, got {spike_sigmas}")
        if max_rewinds < 0:
            raise ValueError(f"guard: max_rewinds must be 0 or more, got {max_rewinds}")
        self.stop_after, self.spike_sigmas, self.max_rewinds = stop_after, spike_sigmas, max_rewinds
        self.losses: deque[float] = deque(maxlen=window)
        self.num_in_a_row = self.num_refused = 0

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step must not be taken, or None. Counts it either way."""
        reason = self._reason(loss, norm)
        if reason is None:
            self.losses.append(loss)
            self.num_in_a_row = 0
        else:
            self.num_in_a_row += 1
            self.num_refused += 1
        return reason

    @property
    def is_over(self) -> bool:
        """Whether too many steps were refused in a row."""
        return self.num_in_a_row >= self.stop_after

    def check(self) -> None:
        """Raises Diverged when too many steps were refused in a row."""
        if self.is_over:
            raise Diverged(
                f"{self.num_in_a_row} steps in a row were refused (guard.stop_after), and the weights are from before; "
                "look at the samples named above; guard.max_rewinds or data.left_out leaves such data out"
            )

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}"
        if self.spike_sigmas is None or 2 * len(self.losses) < (self.losses.maxlen or 0):
            return None
        mean, deviation = fmean(self.losses), stdev(self.losses)
        if loss > mean + self.spike_sigmas * deviation:
            return (
                f"the loss is {loss:.4g}, more than {self.spike_sigmas:g} standard deviations ({deviation:.3g}) above "
                f"the mean of the last {len(self.losses)} ({mean:.4g})"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        counts = {"num_in_a_row": self.num_in_a_row, "num_refused": self.num_refused}
        return {"losses": list(self.losses), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.num_in_a_row, self.num_refused = int(state["num_in_a_row"]), int(state["num_refused"])


def rewind(guard: Guard, trainer: Trainer) -> None:
    """End the run so that its next start leaves out the data of the refused steps, unless it did so too often."""
    run, loader = trainer.default_root_dir, trainer.train_dataloader
    done = len(read_left_out(run))
    if done >= guard.max_rewinds or not isinstance(loader, ResumableLoader):
        return
    first = max(0, loader.position - guard.num_in_a_row * trainer.accumulate_grad_batches)
    trainer.strategy.barrier("rewind")  # all have counted the earlier ones
    if trainer.is_global_zero:
        leave_out(run, first, loader.position)
        print(
            f"{guard.num_in_a_row} steps in a row were refused: the same command with --ckpt_path=last goes on without "
            f"their data, micro-batches {first} to {loader.position - 1} ({done + 1} of {guard.max_rewinds} rewinds)"
        )
    trainer.strategy.barrier("rewound")
    raise Rewind(EXIT_UNFINISHED)
