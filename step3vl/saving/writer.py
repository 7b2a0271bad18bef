"""Writes checkpoints: under a temporary name, forced to disk, with a manifest last, and only then under its name.

Whatever kills the process, a checkpoint exists whole or not at all. In the background, what is written is a copy made
at once, so that training goes on; a failure is printed at once and raised by the next save, never passed over.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step3vl.saving.checkpoint import REST, split
from step3vl.weights.manifest import digest, sync_file, sync_folder, write_manifest
from step3vl.weights.pieces import Piece, own_piece, write_pieces
from step3vl.weights.runs import first_of, step_of

PART = ".part"
OLD = ".old"


class SaveFailed(ValueError):
    """A checkpoint could not be written; those before it are untouched."""


class Writer:
    """Saves one checkpoint at a time.

    Args:
        asynchronous: return once the tensors are copied to main memory, and write in a thread. The copies are kept
            from save to save: one more copy of what this rank holds of weights and moments.
    """

    def __init__(self, asynchronous: bool = False):
        self.asynchronous = asynchronous
        self.done: Callable[[], None] | None = None
        """Called by the first rank once a checkpoint stands."""
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._copies: dict[str, Tensor] = {}
        self._group: Any = None

    def save(self, checkpoint: Mapping[str, Any], path: Path, all_ranks: bool = False) -> None:
        """Save Lightning's dictionary as the folder `path`, replacing what is there.

        Args:
            checkpoint: from `trainer._checkpoint_connector.dump_checkpoint`; with shards, each rank's own.
            path: the same on all ranks.
            all_ranks: every rank calls this and writes its rows; otherwise only one does, and it holds everything.

        Raises:
            SaveFailed: this save, or one before it in the background, could not be written.
        """
        self.wait()
        rank = torch.distributed.get_rank() if all_ranks else 0
        if all_ranks and self._group is None:  # of its own, as a thread's operations must not mix with the training's
            self._group = torch.distributed.new_group(backend="gloo")
        tensors, rest = split(checkpoint)
        found = {name: own_piece(tensor, rank == 0) for name, tensor in tensors.items()}
        pieces = {name: piece for name, piece in found.items() if piece is not None}
        facts = {
            "step": checkpoint.get("global_step"),
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        facts |= {"ranks": torch.distributed.get_world_size() if all_ranks else 1, "torch": torch.__version__}
        if self.asynchronous:
            pieces = self._copied(pieces)
        else:
            pieces = {name: piece._replace(rows=piece.rows.cpu()) for name, piece in pieces.items()}
        work = (path, pieces, rest, facts, rank, all_ranks)
        if self.asynchronous:
            self._thread = threading.Thread(target=self._in_background, args=work, name="checkpoint")
            self._thread.start()
        else:
            self._write(*work)

    def wait(self) -> None:
        """Wait for a save in the background.

        Raises:
            SaveFailed: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise SaveFailed(error)

    # ------------------------------------------------------------------------------------------------ inside

    def _copied(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Copies in main memory, in the same buffers as last time; tensors that share memory share a copy."""
        copies: dict[str, Tensor] = {}
        first: dict[tuple, str] = {}
        out = {}
        for name, piece in pieces.items():
            rows = piece.rows
            place = (rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, rows.device)
            owner = first.setdefault(place, name) if rows.numel() else name
            if owner == name:
                copy = self._copies.get(name)
                if copy is None or copy.shape != rows.shape or copy.dtype != rows.dtype:
                    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
                copies[name] = copy.copy_(rows, non_blocking=True)
            out[name] = piece._replace(rows=copies[owner])
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._copies = copies
        return out

    def _in_background(self, path: Path, *work: Any) -> None:
        try:
            self._write(path, *work)
        except BaseException as error:  # whatever it was, the next save must say so
            self._error = str(error)
            print(f"error: {error}", flush=True)

    def _write(
        self,
        path: Path,
        pieces: Mapping[str, Piece],
        rest: bytes,
        facts: Mapping[str, Any],
        rank: int,
        all_ranks: bool,
    ) -> None:
        part = path.with_name(f".{path.name}{PART}")
        files: dict[str, Any] = {}
        error = self._first_error(self._try(lambda: _begin(part)) if rank == 0 else None, all_ranks)
        if error is None:

            def write() -> None:
                file = part / f"tensors-{rank:05d}.safetensors"
                write_pieces(file, pieces)
                if rank == 0:
                    (part / REST).write_bytes(rest)
                for mine in [file, part / REST] if rank == 0 else [file]:
                    sync_file(mine)
                    files[mine.name] = digest(mine)

            error = self._first_error(self._try(write), all_ranks)
        everyone = self._gathered(files, all_ranks)
        if error is None:

            def finish() -> None:
                write_manifest(part, {name: entry for own in everyone for name, entry in own.items()}, facts)
                _replace(part, path)
                if self.done is not None:
                    self.done()

            error = self._first_error(self._try(finish) if rank == 0 else None, all_ranks)
        if error is not None:
            if rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise SaveFailed(f"{path} could not be saved: {error}; checkpoints before it are untouched")

    def _try(self, act: Callable[[], None]) -> str | None:
        try:
            act()
        except Exception as error:
            rank = f" (rank {torch.distributed.get_rank()})" if torch.distributed.is_initialized() else ""
            return f"{error}{rank}"
        return None

    def _first_error(self, error: str | None, all_ranks: bool) -> str | None:
        return first_of(self._gathered(error, all_ranks))

    def _gathered(self, value: Any, all_ranks: bool) -> list[Any]:
        if not all_ranks:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def _begin(part: Path) -> None:
    """An empty folder to write to; what killed saves left behind is removed."""
    part.parent.mkdir(parents=True, exist_ok=True)
    for left in [*part.parent.glob(f".*{PART}"), *part.parent.glob(f".*{OLD}")]:
        shutil.rmtree(left)
    part.mkdir()


def _replace(part: Path, path: Path) -> None:
    """Give the folder its name. What has that name already is put aside first, and then removed."""
    old = path.with_name(f".{path.name}{OLD}")
    if path.exists():
        os.rename(path, old)
    os.rename(part, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove checkpoints but the newest `keep_last`, and those whose step is a multiple of `keep_every`."""
    from step3vl.weights.runs import saved_steps

    for path in saved_steps(folder)[keep_last:]:
        if keep_every is None or (step_of(path) or 0) % keep_every:
            old = path.with_name(f".{path.name}{OLD}")
            os.rename(path, old)  # at no time does half of it stand under its name
            shutil.rmtree(old)
