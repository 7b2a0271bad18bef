"""A served model's weights, and their exchange for those of another folder while the server runs.

Reinforcement learning serves its policy so: after each iteration the trainer writes a folder and names it. Requests and
answers are SGLang's (/update_weights_from_disk, /get_model_info), so that one client serves both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from step3vl.weights import Accepted, check, open_source
from step3vl.weights.load import fill

from .protocol import Refused

FIELDS = ("model_path", "load_format", "abort_all_requests", "weight_version", "flush_cache")
"""What SGLang's clients send; all but the first may be there and change nothing."""


class Weights:
    """The weights of a model in this process.

    Args:
        module: gets them in place.
        path: where its weights came from.
        folder: new ones must lie in it, for a client may name any path of this machine.
    """

    def __init__(self, module: nn.Module, path: str | Path, folder: str | Path):
        self.module, self.path = module, str(path)
        self.folder = Path(folder).resolve()
        self.num_updates = 0
        self.broken: str | None = None
        """Why the weights are neither the old nor the new ones; None: they are whole."""

    def info(self) -> dict[str, Any]:
        return {"model_path": self.path, "num_updates": self.num_updates, "is_generation": True}

    def read(self, body: bytes) -> Path:
        """The folder that a request names. Raises Refused with a sentence for the client."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        path = fields.get("model_path") if isinstance(fields, dict) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise Refused(400, "the body must be an object with the text model_path", None, "model_path")
        if unknown := sorted(set(fields) - set(FIELDS)):
            raise Refused(400, f"unknown field {unknown[0]!r}", "unknown_parameter", unknown[0])
        if not Path(path).resolve().is_relative_to(self.folder):
            raise Refused(
                403, f"weights are taken from {self.folder} alone (--weights-from)", "forbidden", "model_path"
            )
        return Path(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Take the weights of a folder; names and shapes are compared before a number is changed.

        Raises Refused: nothing is there, it does not fit (the old weights stay), or reading it failed in the middle.
        """
        targets = self.module.state_dict(keep_vars=True)
        try:
            report = check(targets, open_source(path), Accepted(()))
        except (ValueError, OSError) as error:
            raise Refused(400, f"the weights stay those of {self.path}: {error}", "weights_refused") from None
        try:
            fill(targets, report)
        except Exception as error:
            self.broken = f"the weights of {path} could not be read to their end ({error}); load others"
            raise Refused(500, self.broken, "weights_broken") from error
        self.path, self.broken = str(path), None
        self.num_updates += 1
        return {"success": True, "message": f"{len(report.loaded)} tensors of {path}", **self.info()}
