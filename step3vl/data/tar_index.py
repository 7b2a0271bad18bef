"""Where everything lies in a WebDataset shard, and what its bytes were: offsets, checksums, an account of any damage.

A plain tar has no table of contents. Walking its 512-byte headers once gives one, which makes random access, exact
counts and mid-epoch resume possible while the data stay ordinary WebDataset shards. It lies beside the shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_64

from step3vl.data.tar_walk import BLOCK, MAX_MEMBER_BYTES, Members, walk

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
VERSION = 2
INDEX = ".idx.json"


class ShardError(ValueError):
    """A shard as a whole cannot be trusted: missing, empty, truncated, or with a damaged header."""


@dataclass(slots=True)
class ShardIndex:
    """What a shard holds.

    samples:    (key, {extension: (offset, size)}) in file order; only samples whose every member is present.
    checksums:  of each sample, what its bytes were when it was written, or first read.
    damage:     None, or one sentence about where the shard stops being readable.
    broken:     key -> reason, for samples that cannot be used though the shard goes on.
    size_bytes: of the shard that was indexed.
    mtime_ns:   when a shard that is not whole was last changed; None for a whole one, which may be copied and touched.
    """

    path: Path
    samples: list[tuple[str, Members]] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    damage: str | None = None
    broken: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    mtime_ns: int | None = None

    def __len__(self) -> int:
        return len(self.samples)


def index_file(path: Path) -> Path:
    """Where the index of a shard is kept."""
    return path.with_name(path.name + INDEX)


def checksum(members: Iterable[bytes]) -> int:
    """xxh3-64 over the bytes of a sample's members, in the order of the shard."""
    digest = xxh3_64()
    for data in members:
        digest.update(data)
    return digest.intdigest()


def index_shard(path: str | Path, strict: bool = True, again: bool = False) -> ShardIndex:
    """Index a shard, from `<shard>.idx.json` when that was made of a shard of this size.

    A whole shard may have been copied or changed since: its checksums say so when a sample is read. When the size
    differs, or a damaged shard was changed, the headers are walked anew, and checksums of samples that lie where they
    lay are kept.

    strict: raise ShardError on damage. Otherwise the whole samples are returned and `.damage` says what happened. A
    missing or empty file raises ShardError either way.
    again: walk the headers even so, and leave the file as it is.
    """
    path = Path(path)
    known = _load(path)
    try:
        status = path.stat()
    except OSError as error:
        indexed = f"; {len(known)} samples are lost; restore it or delete {index_file(path).name}" if known else ""
        raise ShardError(f"{path}: the shard cannot be opened ({error.strerror}){indexed}") from error
    if not path.is_file() or status.st_size == 0:
        reason = "empty" if path.is_file() else "not a file"
        raise ShardError(f"{path}: the shard is {reason}; {_left(0, known)}")
    index = known
    if index is None or again or index.size_bytes != status.st_size or index.mtime_ns not in (None, status.st_mtime_ns):
        index = _build(path, status, known)
        if not again:
            _save(index)
    if strict and index.damage:
        raise ShardError(index.damage)
    return index


def publish(part: Path, path: Path, checksums: Mapping[str, int]) -> None:
    """Give a finished shard its name and its index; checksums: by key, of the bytes as they were in memory."""
    index_file(path).unlink(missing_ok=True)  # of an earlier shard
    os.replace(part, path)
    _save(_build(path, path.stat(), None, checksums))


def _build(
    path: Path, status: os.stat_result, known: ShardIndex | None, written: Mapping[str, int] | None = None
) -> ShardIndex:
    """Index a shard by its headers, with the checksums of an earlier index or of what was written where they apply."""
    index = ShardIndex(path, size_bytes=status.st_size)
    kept = {key: (at, digest) for (key, at), digest in zip(known.samples, known.checksums)} if known else {}
    members: dict[str, Members] = {}
    found: dict[str, tuple[Members, int]] = {}
    try:
        with path.open("rb") as file:
            damage = walk(file, status.st_size, members, index.broken)
            for key, places in members.items():
                if key in index.broken:
                    continue
                if reason := _check(file, places):
                    index.broken[key] = reason
                elif written and key in written:
                    found[key] = (places, written[key])
                else:
                    same = key in kept and kept[key][0] == places
                    found[key] = kept[key] if same else (places, checksum(_read(file, places)))
            for key, (places, digest) in kept.items() if damage else ():  # a damaged header may describe a sound sample
                if key not in found and checksum(_read(file, places)) == digest:
                    found[key] = (places, digest)
                    index.broken.pop(key, None)
    except OSError as error:
        raise ShardError(f"{path}: the shard cannot be read ({error.strerror})") from error
    for key, (places, digest) in sorted(found.items(), key=lambda item: min(item[1][0].values())):
        index.samples.append((key, places))
        index.checksums.append(digest)
    if damage:
        index.damage = f"{path}: {damage}; {_left(len(index), known)}"
    if damage or index.broken:
        index.mtime_ns = status.st_mtime_ns
    return index


def _left(num: int, known: ShardIndex | None) -> str:
    return f"{num} whole samples are left" + (f" of {len(known)}" if known and len(known) > num else "")


def _read(file: BinaryIO, places: Members) -> Iterable[bytes]:
    for offset, size in places.values():
        file.seek(offset)
        yield file.read(size)


def _check(file: BinaryIO, found: Members) -> str | None:
    """Why a sample cannot be used, or None. Reads its JSON to learn which images it needs."""
    if "json" not in found:
        return f"no .json member, only {', '.join('.' + name for name in found)}"
    offset, size = found["json"]
    file.seek(offset)
    try:
        row = json.loads(file.read(size))
        images = [str(name) for name in (row.get("images") or [])]
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        return f"its .json cannot be parsed ({type(error).__name__})"
    for name in images:
        if name.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            return f"image member '.{name}' has no accepted extension ({', '.join(IMAGE_EXTENSIONS)})"
        if name not in found:
            return f"image member '.{name}' is missing"
    extra = [name for name in found if name != "json" and name not in images]
    return f"member '.{extra[0]}' is not listed in the field 'images'" if extra else None


def _load(path: Path) -> ShardIndex | None:
    try:
        stored = json.loads(index_file(path).read_text())
        if stored["version"] != VERSION:
            return None
        samples = [(str(k), {str(e): (int(a), int(n)) for e, (a, n) in m.items()}) for k, m in stored["samples"]]
        checksums = [int(digest) for digest in stored["checksums"]]
        damage, broken = stored["damage"], {str(k): str(why) for k, why in stored["broken"].items()}
        size, mtime = int(stored["size_bytes"]), stored["mtime_ns"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    places = [place for _, members in samples for place in members.values()]
    if any(a < BLOCK or n < 0 or n > MAX_MEMBER_BYTES or a + n > size for a, n in places):
        return None
    if len(checksums) != len(samples) or not all(members for _, members in samples):
        return None
    return ShardIndex(path, samples, checksums, None if damage is None else f"{path}: {damage}", broken, size, mtime)


def _save(index: ShardIndex) -> None:
    """Written beside and renamed, so that processes that index at once do not see half a file."""
    stored = {"version": VERSION, **asdict(index)}
    del stored["path"]
    if index.damage:
        stored["damage"] = index.damage.removeprefix(f"{index.path}: ")
    place = index_file(index.path)
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(stored, separators=(",", ":")))
        os.replace(part, place)
    except OSError:  # a read-only folder: the index is rebuilt next time
        part.unlink(missing_ok=True)
