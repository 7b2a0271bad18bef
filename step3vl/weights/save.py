"""Out to disk: safetensors shards with an index, written one tensor at a time into a folder that appears when whole.

An export that is interrupted leaves a folder called OUT.part with a note in it, never one that looks finished.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from step3vl.weights.source import DTYPES, INDEX, Entry

CODES = {dtype: code for code, dtype in DTYPES.items()}
NOTE = "UNFINISHED"
MAX_SHARD_BYTES = 5_000_000_000
"""As in the releases of models of this size."""


@contextmanager
def unfinished(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` when the block ends without an error.

    Raises:
        ValueError: `out` already holds something, or OUT.part is there and not ours.
    """
    out = Path(out)
    part = out.with_name(out.name + ".part")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists; choose another name or remove it first")
    if part.exists() and not (part / NOTE).is_file():
        raise ValueError(f"{part} is in the way and was not left by an interrupted export; remove it")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    (part / NOTE).write_text("This folder is being written; it is renamed when it is whole.\n")
    try:
        yield part
    except BaseException:
        shutil.rmtree(part)
        raise
    (part / NOTE).unlink()
    if out.exists():
        out.rmdir()
    part.rename(out)


def save_sharded(
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write model-0000i-of-0000N.safetensors and the index into `folder`; only one tensor is in memory at a time.

    Args:
        entries: name -> (shape, dtype) in the order of writing.
        read: name -> tensor of exactly that shape and dtype.
        folder: exists; see `unfinished`.
        max_shard_bytes: a shard is closed before it would grow beyond this; a larger tensor has a shard of its own.

    Raises:
        ValueError: a tensor is not what its entry says, or a number format has no safetensors name.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, entry in entries.items():
        if shards[-1] and entry.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= entry.num_bytes
    files = [Path(folder) / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards):
        _write_shard(file, {name: entries[name] for name in names}, read)
    weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
    total = sum(entry.num_bytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_shard(file: Path, entries: Mapping[str, Entry], read: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)  # wide numbers first: all stay aligned
    end = 0
    for name in order:
        shape, dtype = entries[name]
        if dtype not in CODES:
            raise ValueError(f"{name} is {dtype}, which safetensors cannot hold")
        start, end = end, end + entries[name].num_bytes
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = read(name).detach().cpu().contiguous()
            if (tuple(tensor.shape), tensor.dtype) != tuple(entries[name]):
                given, wanted = (list(tensor.shape), tensor.dtype), (list(entries[name].shape), entries[name].dtype)
                raise ValueError(f"{name} was announced as {wanted} and is {given}")
            if math.prod(tensor.shape):
                stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
