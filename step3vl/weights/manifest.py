"""The manifest of a checkpoint: every file with its size and checksum, written last.

A folder with a manifest was written to its end; one whose files agree with it is what was written. Checksums are
xxh3-128, which finds every flipped bit (docs/reliability.md) and costs less than reading the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

NAME = "manifest.json"
FORMAT = 1
"""Version of a checkpoint's layout; a reader refuses what is newer."""
CHUNK_BYTES = 2**24


class Damaged(ValueError):
    """A checkpoint is not what was written; the message names the file."""


def digest(file: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    total, checksum = 0, xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            total += len(chunk)
            checksum.update(chunk)
    return {"bytes": total, "xxh3_128": checksum.hexdigest()}


def write_manifest(folder: Path, files: Mapping[str, dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write the manifest of `folder` and force it to disk; `facts` are plain values that are shown by `list`."""
    manifest = {"format": FORMAT, "facts": dict(facts), "files": dict(sorted(files.items()))}
    manifest["self"] = _checksum(manifest)
    with (folder / NAME).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own checksum.

    Raises:
        Damaged: there is none, or it is not what was written.
        ValueError: a newer release wrote it.
    """
    file = folder / NAME
    if not file.is_file():
        raise Damaged(f"{folder} has no {NAME}: it was not written to its end")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        written, number = manifest.pop("self"), manifest["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{file} is damaged: it cannot be read") from None
    if _checksum(manifest) != written:
        raise Damaged(f"{file} is damaged: its checksum differs")
    if any(Path(name).name != name for name in manifest["files"]):
        raise Damaged(f"{file} names a file outside of the checkpoint")
    if number > FORMAT:
        raise ValueError(f"{folder} has format {number}, this release reads up to {FORMAT}; use a newer release")
    return manifest


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        share: (i, n): check every n-th file, from the i-th on, so that n ranks share the work.

    Raises:
        Damaged: a file is missing, has another size or another checksum.
    """
    files: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    for name, wanted in list(files.items())[share[0] :: share[1]]:
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing")
        size = file.stat().st_size
        if size != wanted["bytes"]:
            raise Damaged(f"{file} is damaged: it has {size:,} bytes, {wanted['bytes']:,} were written")
        if digest(file) != wanted:
            raise Damaged(f"{file} is damaged: its checksum differs")


def sync_file(file: Path) -> None:
    """Wait until a file is on disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _checksum(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({key: manifest[key] for key in sorted(manifest) if key != "self"}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
