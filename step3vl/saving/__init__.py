"""A run's checkpoints: written whole or not at all, in the background if wanted, read on any number of ranks.

`RunCheckpointIO` is Lightning's plugin; the callback `step3vl.callbacks.Checkpoints` says when. What a checkpoint
looks like on disk is in `step3vl.weights` (`pieces`, `manifest`, `runs`).
"""

from __future__ import annotations

from step3vl.saving.checkpoint import read_checkpoint
from step3vl.saving.lightning_io import RunCheckpointIO
from step3vl.saving.writer import SaveFailed, Writer

__all__ = ["RunCheckpointIO", "SaveFailed", "Writer", "read_checkpoint"]
