"""The checkpoints of a run: folders `checkpoints/step-N`, of which only whole ones are ever used."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from step3vl.weights import manifest
from step3vl.weights.manifest import Damaged

FOLDER = "checkpoints"


def step_name(step: int) -> str:
    """Folder name of the checkpoint after so many optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Optimizer steps before a checkpoint, from its folder name; None: it is not named as one."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint, whole or not."""
    return path.is_dir() and (step_of(path) is not None or (path / manifest.NAME).is_file())


def saved_steps(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder of them, newest first; half-written ones have other names."""
    found = (
        [path for path in folder.iterdir() if path.is_dir() and step_of(path) is not None] if folder.is_dir() else []
    )
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def folder_of(path: Path) -> Path:
    """Where the checkpoints of a run are, given the run or that folder itself."""
    return path / FOLDER if (path / FOLDER).is_dir() else path


def say_once(text: str) -> None:
    """Print, on the first rank."""
    if _num_ranks() == 1 or torch.distributed.get_rank() == 0:
        print(text, flush=True)


def choose(path: Path, say: Callable[[str], None] = say_once) -> Path:
    """The checkpoint at `path`, or the newest whole one of a run; its files have been compared with its manifest.

    Called by all ranks, it shares the reading among them.

    Args:
        path: one checkpoint, a run, or a run's folder of checkpoints.
        say: told of every checkpoint that is refused, and of the one that is used in its place.

    Raises:
        Damaged: the one that was named is not what was written, or none is.
        ValueError: there is no checkpoint.
    """
    if is_checkpoint(path):
        verify_together(path)
        return path
    candidates = saved_steps(folder_of(path))
    if not candidates:
        raise ValueError(f"there is no checkpoint in {path}")
    refused = ""
    for number, candidate in enumerate(candidates):
        try:
            verify_together(candidate)
        except Damaged as error:
            refused = refused or str(error)
            say(f"checkpoint refused: {error}")
            continue
        if number:
            say(f"going on from {candidate}, the newest that is whole")
        return candidate
    raise Damaged(f"none of the {len(candidates)} checkpoints in {folder_of(path)} is whole; the newest: {refused}")


def verify_together(folder: Path) -> None:
    """`verify`, each rank some of the files; a rank that finds damage raises it on all."""
    error, num_ranks = None, _num_ranks()
    try:
        manifest.verify(folder, (torch.distributed.get_rank(), num_ranks) if num_ranks > 1 else (0, 1))
    except Damaged as found:
        error = str(found)
    except OSError as found:  # a disk that fails rarely says so with wrong bytes
        error = f"{folder} cannot be read: {found}"
    if num_ranks > 1:
        errors: list[Any] = [None] * num_ranks
        torch.distributed.all_gather_object(errors, error)
        error = first_of(errors)
    if error:
        raise Damaged(error)


def first_of(errors: Sequence[str | None]) -> str | None:
    """The first error among ranks."""
    return next((error for error in errors if error), None)


def _num_ranks() -> int:
    is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_running else 1
