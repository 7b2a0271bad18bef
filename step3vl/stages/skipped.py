"""Samples that could not be used: each one is named, all are counted, and a run with too many of them stops.

A damaged sample costs itself and nothing else; a data set of which much is damaged should be repaired, not trained on.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

from lightning.pytorch import Trainer

from step3vl.types import Batch

ENOUGH = 200
"""Samples drawn, over all ranks, before their share is judged."""
NUM_SHOWN, NUM_LAST = 20, 5
"""Reasons that a rank prints as they come, and once more at the end."""


class Skipped:
    """Counts of one start of a run, and its list of reasons: `skipped-rank0.txt` ... in the run's folder.

    num_drawn, num_skipped: over all ranks.
    step: (drawn, skipped) of this rank since the last `settle`.
    """

    def __init__(self) -> None:
        self.num_drawn = self.num_skipped = self.num_shown = 0
        self.step = (0, 0)
        self.last: deque[str] = deque(maxlen=NUM_LAST)

    def report(self, batch: Batch, trainer: Trainer) -> None:
        """Count a batch, show the first reasons and list all: nothing is skipped silently."""
        num = len(batch.skipped)
        self.step = (self.step[0] + len(batch.sample_ids) + num, self.step[1] + num)
        if not num:
            return
        self.last.extend(batch.skipped)
        self._print(batch.skipped[: max(0, NUM_SHOWN - self.num_shown)], trainer)
        self.num_shown += num
        place = _list(trainer)
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(f"step {trainer.global_step}: {reason}\n" for reason in batch.skipped)

    def settle(self, num_drawn: int, num_skipped: int, trainer: Trainer) -> None:
        """Take over what all ranks drew and skipped in a step.

        Raises ValueError, then on all ranks, when more than `data.max_skipped_share` of all samples could not be used.
        """
        self.num_drawn, self.num_skipped = self.num_drawn + num_drawn, self.num_skipped + num_skipped
        self.step = (0, 0)
        share = getattr(getattr(trainer, "datamodule", None), "max_skipped_share", 1.0)
        if self.num_drawn < ENOUGH or self.num_skipped <= share * self.num_drawn:
            return
        self._print(self.last, trainer)
        raise ValueError(
            f"{self.num_skipped} of the {self.num_drawn} samples drawn could not be used, and data.max_skipped_share "
            f"is {share:g}; they are named in {_list(trainer).with_name('skipped-rank*.txt')}"
        )

    def _print(self, reasons: deque[str] | list[str], trainer: Trainer) -> None:
        for reason in reasons:
            print(f"skipped sample {reason}" + (f" (rank {trainer.global_rank})" if trainer.global_rank else ""))


def _list(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / f"skipped-rank{trainer.global_rank}.txt"
