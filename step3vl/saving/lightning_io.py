"""Lightning's plugin for checkpoints of ours; files of others are read as Lightning does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from step3vl.saving.checkpoint import read_checkpoint
from step3vl.saving.writer import Writer
from step3vl.weights.runs import choose


class RunCheckpointIO(TorchCheckpointIO):
    """Saves and loads folders (`step3vl.saving`); a path to a file is loaded with weights_only, as Lightning's own.

    Args:
        asynchronous: write in the background.
    """

    def __init__(self, asynchronous: bool = False):
        super().__init__()
        self.writer = Writer(asynchronous)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save what one process holds alone; sharded strategies use the writer themselves."""
        self.writer.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load one checkpoint, or the newest whole one of a run."""
        if Path(path).is_dir():
            return read_checkpoint(choose(Path(path)))
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            super().remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait for a save in the background."""
        self.writer.wait()
