"""What a run has saved."""

from pathlib import Path
from typing import Any

from torch import Tensor

from step3vl.saving import read_checkpoint
from step3vl.weights.runs import choose


def checkpoint(run: str | Path) -> dict[str, Any]:
    """Lightning's dictionary of the newest checkpoint of a run."""
    return read_checkpoint(choose(Path(run)))


def weights(run: str | Path) -> dict[str, Tensor]:
    """The parameters in it, by the names of the stage."""
    return checkpoint(run)["state_dict"]
