"""Where tensors come from: safetensors folders and files, PyTorch state dicts, Lightning checkpoints, run folders.

`open_source` reads headers alone and refuses what is incomplete: a shard that is missing, cut short or at odds with its
index. Pickles are opened with weights_only: a file that wants to run code is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of number formats."""
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".consolidated")
OURS = "vlm."
"""How a stage's checkpoint calls the model."""
ENCODER_ALONE = "vision_encoder."
"""What names begin with in the checkpoint of a stage that trains an encoder alone; the rest of it is thrown away."""
MODEL = "model/"
"""What the names of a stage's parameters begin with in our checkpoints; others are the optimizer's."""


class Entry(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource:
    """Named tensors on disk. `keys()` costs nothing; `read` brings one tensor, or some of its rows, into memory."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path = path
        self._entries = dict(entries)

    def keys(self) -> dict[str, Entry]:
        """Name -> (shape, dtype), from headers alone."""
        return self._entries

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor of this name; with `rows` only those from rows[0] to rows[1] (exclusive) of its first axis.

        Raises:
            ValueError: the source has no such tensor.
        """
        if name not in self._entries:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self._read(name, rows)

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _read")


Place = tuple[Path, int, Entry]
"""Where a tensor is: file, first byte, and what the header says of it."""


class _Safetensors(TensorSource):
    """Tensors at known places of one or more files; each read touches only the bytes asked for."""

    def __init__(self, path: Path, places: Mapping[str, Place]):
        super().__init__(path, {name: entry for name, (_, _, entry) in places.items()})
        self._places = places

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        return read_place(name, self._places[name], rows)


class _InMemory(TensorSource):
    """A state dict; its tensors are mapped from the file where the file allows it."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        super().__init__(path, {name: Entry(tuple(t.shape), t.dtype) for name, t in tensors.items()})
        self._tensors = tensors

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        tensor = self._tensors[name]
        return tensor if rows is None else tensor[rows[0] : rows[1]]


def read_place(name: str, place: Place, rows: tuple[int, int] | None = None) -> Tensor:
    """A tensor, or its rows from rows[0] to rows[1] (exclusive), from its place; only those bytes are read."""
    file, start, (shape, dtype) = place
    if rows is not None:
        start += rows[0] * math.prod(shape[1:]) * dtype.itemsize
        shape = (rows[1] - rows[0], *shape[1:])
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, num_bytes)  # pages of its own: all of it goes back when the tensor does
    with file.open("rb") as stream:
        stream.seek(start)
        if stream.readinto(memory) != num_bytes:
            raise ValueError(f"{file} ended in the middle of tensor {name!r}; copy the file again")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def open_source(path: str | Path) -> TensorSource:
    """Open a checkpoint of any kind by its headers.

    Accepted: a folder with safetensors (one file, or shards with an index), a .safetensors file, a .pt, .pth or .bin
    state dict, a checkpoint of ours (the part under `vlm.`), and a run (its newest checkpoint that is whole).

    Raises:
        ValueError: there is nothing to read, something is missing or cut short, or a pickle wants to run code. One
            sentence that names the file.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: give a folder, a .safetensors file, or one of {', '.join(PICKLES)}")
    if path.suffix == ".safetensors":
        return _Safetensors(path, read_header(path))
    if path.suffix in PICKLES:
        return _InMemory(path, _unpickle(path))
    raise ValueError(f"{path} is not a checkpoint by its name: accepted are .safetensors, {', '.join(PICKLES)}")


def _open_folder(folder: Path) -> TensorSource:
    from step3vl.weights.pieces import Pieces
    from step3vl.weights.runs import choose, folder_of, is_checkpoint, saved_steps

    if (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder} is a distributed checkpoint of torch; gather it first: "
            f"python -m lightning.fabric.utilities.consolidate_checkpoint {folder}"
        )
    if is_checkpoint(folder) or saved_steps(folder_of(folder)):
        chosen = choose(folder)
        found = Pieces(chosen, MODEL + OURS)
        return found if found.keys() else Pieces(chosen, MODEL, only=ENCODER_ALONE)
    if (folder / INDEX).is_file():
        return _Safetensors(folder, _read_shards(folder))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise ValueError(f"{folder} has {len(files)} safetensors files but no {INDEX} that says what belongs together")
    if files:
        return _Safetensors(folder, read_header(files[0]))
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES and file.is_file())
    if len(pickles) == 1:
        return open_source(pickles[0])
    if pickles:
        raise ValueError(f"{folder} has {len(pickles)} state dicts ({pickles[0].name}, ...); name one of them")
    raise ValueError(f"{folder} holds no checkpoint: no *.safetensors, no checkpoints/step-N, no state dict")


def _read_shards(folder: Path) -> dict[str, Place]:
    """Places of all tensors of an index, after every shard has been looked at."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is not a safetensors index ({error!r})") from None
    shards = sorted(set(weight_map.values()))
    if odd := [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]:
        raise ValueError(f"{folder / INDEX} names {odd[0]!r}, which is not a file beside it")
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        some = f"{absent[0]} is missing" if len(absent) == 1 else f"{len(absent)} are missing, the first is {absent[0]}"
        raise ValueError(f"{folder}: of {len(shards)} shards in the index {some}; copy the folder again")
    headers = {shard: read_header(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ValueError(f"{folder / shard} does not hold {name!r}, as {INDEX} says it does")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_file_metadata(file: Path) -> dict[str, str]:
    """The free text values in a safetensors file's header."""
    with file.open("rb") as stream:
        header, _ = _parse_header(stream, file, file.stat().st_size)
    return header.get("__metadata__") or {}


def read_header(file: Path) -> dict[str, Place]:
    """Name -> (file, first byte, entry) of a safetensors file, checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header, start = _parse_header(stream, file, size)
    places, end = {}, 0
    for name, item in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file}: the header's entry of {name!r} cannot be read: {item!r}") from None
        entry = Entry(shape, dtype)
        if last - first != entry.num_bytes or first < 0:
            given = f"{last - first} bytes, not {entry.num_bytes}"
            raise ValueError(f"{file}: the header gives {name!r} of shape {list(shape)} {given}")
        places[name], end = (file, start + first, entry), max(end, last)
    if start + end != size:
        what = "is cut short" if size < start + end else "has bytes that its header does not know"
        raise ValueError(f"{file} {what}: {size:,} bytes, its header wants {start + end:,}; copy the file again")
    return places


def _parse_header(stream: BinaryIO, file: Path, size: int) -> tuple[dict[str, Any], int]:
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    header = None
    if len(first) == 8 and length <= min(size - 8, MAX_HEADER_BYTES):
        with contextlib.suppress(ValueError, RecursionError):
            header = json.loads(stream.read(length))
    if isinstance(header, dict):
        return header, 8 + length
    if first[:2] in (b"PK", b"\x80\x02"):
        raise ValueError(f"{file} is a pickle, not safetensors; name it .pt, and it is loaded with weights_only")
    raise ValueError(f"{file} is not a safetensors file, or its header is cut short")


def _unpickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a state dict, of the `state_dict` or `model` in it, or of the model of one of our checkpoints."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ValueError(
                f"{file} holds more than tensors, and reading it could run code; save it again as a plain state dict "
                "(torch.save(model.state_dict(), ...)) or as safetensors"
            ) from None
        raise ValueError(f"{file} is not a PyTorch checkpoint") from None
    except Exception as error:  # what a damaged pickle raises is up to its bytes
        raise ValueError(f"{file} is damaged or not a PyTorch checkpoint ({type(error).__name__})") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    ours = {name.removeprefix(OURS): tensor for name, tensor in tensors.items() if name.startswith(OURS)}
    if not tensors:
        raise ValueError(f"{file} holds no named tensors; a state dict is needed")
    return ours or tensors
