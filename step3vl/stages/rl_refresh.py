"""The policy on a server: its weights are written to a folder after they changed, and the server is told to take them.

So rollouts come from the policy as it is, though another process draws them. A folder appears under its name when it is
whole; it has the layout of an exported one (`step3vl export`), which our server, SGLang and vLLM read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from step3vl.models import VisionLanguageModel
from step3vl.types import Generator
from step3vl.weights import Accepted, Entry, check, open_source, save_sharded, unfinished

from .tally import gather

NAME = "policy-" + "[0-9]" * 8
"""Of the policy's folders, as a glob."""
NUM_KEPT = 2
"""Folders that stay: the one that is served, and the one before."""
NUM_TRIES = 3
"""How often an iteration's responses are asked for when the server turns out to have lost its weights meanwhile."""
WEIGHTS = (".safetensors", ".safetensors.index.json")


class Refresh:
    """Keeps a server's weights those of the policy.

    Args:
        like: an exported folder of this model: new ones have its names, number formats, tokenizer and configuration.
            Export in fp32 to serve exactly what is trained; a bf16 folder rounds.
        folder: where the policy's folders are written, by steps; the server must see it under the same name.
        every_n_steps: steps of the policy from one refresh to the next. Above 1, responses come from an older policy:
            give the objective a correction, or more mini-batches than one.
    """

    def __init__(self, like: str, folder: str, every_n_steps: int = 1):
        if every_n_steps < 1:
            raise ValueError(f"model.refresh.every_n_steps is {every_n_steps}; accepted is 1 or more")
        if not Path(like).is_dir():
            raise ValueError(f"model.refresh.like is {like}, which is no folder; make it: step3vl export RUN {like}")
        self.like, self.folder = Path(like), Path(folder).resolve()
        self.every_n_steps = every_n_steps
        self.step: int | None = None
        """Of the policy that was written last; None: none was."""
        self.num_told = 0
        """How often the server took weights."""

    @property
    def place(self) -> Path:
        """The folder that the server is to answer from."""
        return self.folder / f"policy-{self.step or 0:08d}"

    def collect(self, vlm: VisionLanguageModel, generator: Generator, step: int, ask: Callable[[], Any]) -> Any:
        """What `ask` gives, from a server that had the right weights before and after it; all ranks call it.

        Raises ValueError, on all ranks: the server does not take the weights, or loses them again and again.
        """
        for _ in range(NUM_TRIES):
            self.push(vlm, generator, step)
            found = ask()
            if self._is_current(generator):
                return found
        raise ValueError(
            f"step {step}: the server answered from other weights than {self.place} after each of {NUM_TRIES} tries; "
            "nothing was learnt from its responses"
        )

    def push(self, vlm: VisionLanguageModel, generator: Generator, step: int) -> None:
        """Write the policy if it has moved on, and have the server take it if it has not; all ranks call it."""
        is_due = self.step is None or step - self.step >= self.every_n_steps
        tensors = self._gather(vlm) if is_due else {}
        self.step = step if is_due else self.step
        error = None
        if _rank() == 0:
            try:
                if is_due:
                    self._write(tensors)
                if is_due or generator.served() != str(self.place):  # type: ignore[attr-defined]
                    generator.load_weights(self.place)  # type: ignore[attr-defined]
                    self.num_told += 1
                self._forget()
            except (ValueError, OSError) as caught:
                error = str(caught)
        error = gather(error)[0]
        if error is not None:
            raise ValueError(f"step {step}: {error}")

    # ------------------------------------------------------------------------------------------------ inside

    def _is_current(self, generator: Generator) -> bool:
        """Whether the server still has them; one that does not say is believed."""
        served = generator.served() if _rank() == 0 else None  # type: ignore[attr-defined]
        return bool(gather(served in (None, str(self.place)))[0])

    def _gather(self, vlm: VisionLanguageModel) -> dict[str, Tensor]:
        """The policy's tensors by the names of `like`, whole, in main memory of rank 0 alone."""
        targets = vlm.state_dict(keep_vars=True)
        source = open_source(self.like)
        names, entries = check(targets, source, Accepted(())).loaded, source.keys()
        found: dict[str, Tensor] = {}
        for ours, theirs in names.items():
            tensor = targets[ours].detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if _rank() == 0:
                found[theirs] = whole.to("cpu", entries[theirs].dtype, copy=True)
        return found

    def _write(self, tensors: dict[str, Tensor]) -> None:
        for rest in [self.place, *self.folder.glob(f"{NAME}.part")]:  # of a run that ended here and goes on
            shutil.rmtree(rest, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        with unfinished(self.place) as part:
            save_sharded(entries, tensors.__getitem__, part)
            for file in sorted(self.like.iterdir()):
                if file.is_file() and not file.name.endswith(WEIGHTS):
                    shutil.copy(file, part)

    def _forget(self) -> None:
        """Remove older folders of ours."""
        for old in sorted(self.folder.glob(NAME))[: -NUM_KEPT or None]:
            if old != self.place:
                shutil.rmtree(old, ignore_errors=True)


def _rank() -> int:
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_there else 0
