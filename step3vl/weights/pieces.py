"""Tensors of a checkpoint in safetensors files, whole or by rows: each rank writes the rows that it keeps.

A file's metadata says for every piece where its rows begin, and how many the whole tensor has. What is read does not
depend on how many ranks wrote.

Shapes: R rows of a whole tensor (its first axis).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from step3vl.weights.source import Entry, TensorSource, read_file_metadata, read_header, read_place

PATTERN = "tensors-*.safetensors"


class Piece(NamedTuple):
    """Rows of a tensor that one rank keeps."""

    rows: Tensor
    first: int = 0
    num_rows: int | None = None  # R; None: `rows` is the whole tensor


def own_piece(tensor: Tensor, is_first_rank: bool) -> Piece | None:
    """What this rank writes of a tensor: its rows of a sharded one; of one that all ranks hold, only the first's.

    Raises:
        ValueError: the tensor is sharded over another axis than its first.
    """
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach()) if is_first_rank else None
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    if any(isinstance(placement, Replicate) and at for placement, at in zip(tensor.placements, coordinate)):
        return None  # another copy writes it
    first, num_rows = local_rows(tensor)
    if num_rows is None:
        return Piece(tensor.to_local().detach())
    return Piece(tensor.to_local().detach()[:num_rows], first, len(tensor)) if num_rows else None


def local_rows(tensor: DTensor) -> tuple[int, int | None]:
    """(first, number) of the rows that this rank keeps; None for a number: the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement not in (Replicate(), Shard(0)) for placement in tensor.placements):
        raise ValueError(f"placement {tensor.placements} cannot be saved; only the first axis may be sharded")
    if not tensor.ndim or Shard(0) not in tensor.placements:
        return 0, None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]


def write_pieces(file: Path, pieces: Mapping[str, Piece]) -> None:
    """Write one rank's pieces to one file. Tensors that share memory are written once each."""
    rows = {name: [piece.first, piece.num_rows] for name, piece in pieces.items() if piece.num_rows is not None}
    first: dict[tuple, str] = {}
    same: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, piece in pieces.items():
        value = piece.rows
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and first.setdefault(place, name) != name:
            same[name] = first[place]
        else:
            tensors[name] = value.contiguous()
    save_file(tensors, file, metadata={"rows": json.dumps(rows), "same": json.dumps(same)})
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors gives it to the owner alone


class Pieces(TensorSource):
    """The tensors of a checkpoint folder; a range of rows touches only the files that hold some of it.

    Args:
        folder: the checkpoint.
        prefix: names that begin with it are taken, without it.
        only: what a name must then begin with; it stays.
    """

    def __init__(self, folder: Path, prefix: str = "", only: str = ""):
        self._pieces: dict[str, list[tuple[int, tuple[Path, int, Entry]]]] = {}
        entries: dict[str, Entry] = {}
        for file in sorted(folder.glob(PATTERN)):
            metadata, places = read_file_metadata(file), read_header(file)
            rows, same = (json.loads(metadata.get(key, "{}")) for key in ("rows", "same"))
            for name, place in [*places.items(), *((name, places[other]) for name, other in same.items())]:
                if not name.startswith(prefix + only):
                    continue
                shape, dtype = place[2]
                first, num_rows = rows.get(name, (0, None))
                short = name.removeprefix(prefix)
                self._pieces.setdefault(short, []).append((first, place))
                entries[short] = Entry(shape if num_rows is None else (num_rows, *shape[1:]), dtype)
        super().__init__(folder, entries)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            self._check(name, pieces)

    def _check(self, name: str, pieces: list[tuple[int, tuple[Path, int, Entry]]]) -> None:
        """Raises ValueError when the pieces do not make the whole."""
        shape = self._entries[name].shape
        if not shape:
            return
        at = 0
        for first, (_, _, entry) in pieces:
            at = at + entry.shape[0] if first == at else -1
        if at != shape[0]:
            raise ValueError(f"{self.path} holds {name!r} with gaps or twice; it is not a whole checkpoint")

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        pieces = self._pieces[name]
        if len(pieces) == 1:
            return read_place(name, pieces[0][1], rows)
        low, high = rows or (0, self._entries[name].shape[0])
        parts = []
        for first, place in pieces:
            start, stop = max(low, first), min(high, first + place[2].shape[0])
            if start < stop:
                parts.append(read_place(name, place, (start - first, stop - first)))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else read_place(name, pieces[0][1], (0, 0))


def read_like(source: TensorSource, name: str, like: Tensor | None) -> Tensor:
    """A tensor of the source; where `like` is sharded and of the same shape, this rank's rows of it, sharded alike."""
    shape = source.keys()[name].shape
    if not isinstance(like, DTensor) or tuple(like.shape) != shape:
        return source.read(name)
    first, num_rows = local_rows(like)
    rows = source.read(name) if num_rows is None else source.read(name, (first, first + num_rows))
    local = rows.to(like.device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
