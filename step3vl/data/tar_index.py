"""Where everything lies in a WebDataset shard: an index of tar members with offsets, and an account of any damage.

A plain tar has no table of contents. Walking its 512-byte headers once gives one, which makes random access, exact
counts and mid-epoch resume possible while the data stay ordinary WebDataset shards. It is cached beside the shard.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
MAX_MEMBER_BYTES = 64 * 2**20
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
VERSION = 1

Members = dict[str, tuple[int, int]]


class ShardError(ValueError):
    """A shard as a whole cannot be trusted: missing, empty, truncated, or with a damaged header."""


@dataclass(slots=True)
class ShardIndex:
    """What a shard holds.

    samples: (key, {extension: (offset, size)}) in file order; only samples whose every member is present.
    damage:  None, or one sentence about where the shard stops being readable.
    broken:  key -> reason, for samples that cannot be used though the shard goes on.
    """

    path: Path
    samples: list[tuple[str, Members]] = field(default_factory=list)
    damage: str | None = None
    broken: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)


class _Damage(Exception):
    """Raised inside the walk; the text says what is wrong at which byte."""


def index_shard(path: str | Path, strict: bool = True) -> ShardIndex:
    """Index a shard, from its cache `<shard>.idx.json` when that matches the shard's size and modification time.

    strict: raise ShardError on damage. Otherwise the whole samples before the damage are returned and `.damage` says
    what happened. A missing or empty file raises ShardError either way.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise ShardError(f"{path}: the shard cannot be opened ({error.strerror})") from error
    if not path.is_file() or status.st_size == 0:
        raise ShardError(f"{path}: the shard is {'empty' if path.is_file() else 'not a file'}; 0 whole samples")
    stamp = [VERSION, status.st_size, status.st_mtime_ns]
    cache = path.with_name(path.name + ".idx.json")
    index = _load(cache, path, stamp)
    if index is None:
        index = _build(path, status.st_size)
        _save(cache, index, stamp)
    if strict and index.damage:
        raise ShardError(index.damage)
    return index


def _build(path: Path, size: int) -> ShardIndex:
    index = ShardIndex(path)
    members: dict[str, Members] = {}
    try:
        with path.open("rb") as file:
            try:
                _walk(file, size, members, index.broken)
            except _Damage as damage:
                index.damage = str(damage)
            for key, found in members.items():
                if key not in index.broken:
                    reason = _check(file, found)
                    if reason:
                        index.broken[key] = reason
                    else:
                        index.samples.append((key, found))
    except OSError as error:
        raise ShardError(f"{path}: the shard cannot be read ({error.strerror})") from error
    if index.damage:
        index.damage = f"{path}: {index.damage}; {len(index.samples)} whole samples precede it"
    return index


def _walk(file: BinaryIO, size: int, members: dict[str, Members], broken: dict[str, str]) -> None:
    """Fill `members` from the headers. Raises _Damage where the tar stops making sense."""
    offset, long_name = 0, None
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _Damage(f"truncated at byte {offset}: the end-of-archive mark is missing")
        if header == bytes(BLOCK):
            return _expect_end(file, offset)
        length = _check_header(header, offset)
        start, kind = offset + BLOCK, header[156:157]
        if start + length > size:
            raise _Damage(f"truncated at byte {size}: the member at byte {offset} needs {start + length - size} more")
        offset = start + -(-length // BLOCK) * BLOCK
        if kind in (b"x", b"L"):  # the next member's long name
            if length > 2**16:
                raise _Damage(f"a name of {length} bytes at byte {start}")
            long_name = _long_name(kind, file.read(length)) or long_name
            continue
        if kind in (b"g", b"5"):  # global attributes, folders
            continue
        name = long_name or _text(header[:100], prefix=header[345:500] if header[257:262] == b"ustar" else b"")
        long_name = None
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = (f"{folder}/{stem}" if folder else stem), extension.lower()
        found = members.setdefault(key, {})
        if kind not in (b"0", b"\0"):
            broken[key] = f"member '.{extension}' is a link or a device, not a file"
        elif extension in found:
            broken[key] = f"member '.{extension}' appears twice"
        elif length > MAX_MEMBER_BYTES:
            broken[key] = f"member '.{extension}' has {length} bytes; at most {MAX_MEMBER_BYTES} are accepted"
        found[extension] = (start, length)


def _check_header(header: bytes, offset: int) -> int:
    """Size in bytes of the member whose 512-byte header this is."""
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
        length = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damage(f"no tar header at byte {offset}") from None
    if stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise _Damage(f"wrong checksum in the tar header at byte {offset}")
    return length


def _expect_end(file: BinaryIO, offset: int) -> None:
    """After the first block of zeros only zeros may follow; anything else is an overwritten header."""
    while chunk := file.read(2**20):
        if chunk.count(0) != len(chunk):
            raise _Damage(f"a zeroed tar header at byte {offset} with data after it")


def _long_name(kind: bytes, data: bytes) -> str | None:
    if kind == b"L":
        return _text(data)
    for record in data.split(b"\n"):
        _, _, pair = record.partition(b" ")
        if pair.startswith(b"path="):
            return pair[5:].decode("utf-8", "replace")
    return None


def _text(name: bytes, prefix: bytes = b"") -> str:
    parts = [part.split(b"\0", 1)[0].decode("utf-8", "replace") for part in (prefix, name)]
    return "/".join(part for part in parts if part)


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


def _load(cache: Path, path: Path, stamp: list[int]) -> ShardIndex | None:
    try:
        stored = json.loads(cache.read_text())
        if stored["stamp"] != stamp:
            return None
        samples = [(str(k), {str(e): (int(a), int(n)) for e, (a, n) in m.items()}) for k, m in stored["samples"]]
        damage, broken = stored["damage"], {str(k): str(why) for k, why in stored["broken"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if any(a < BLOCK or n < 0 or n > MAX_MEMBER_BYTES or a + n > stamp[1] for _, m in samples for a, n in m.values()):
        return None
    return ShardIndex(path, samples, None if damage is None else f"{path}: {damage}", broken)


def _save(cache: Path, index: ShardIndex, stamp: list[int]) -> None:
    """Written beside and renamed, so that processes that index at once do not see half a file."""
    stored = asdict(index)
    del stored["path"]
    stored["stamp"] = stamp
    if index.damage:
        stored["damage"] = index.damage.removeprefix(f"{index.path}: ")
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(stored, separators=(",", ":")))
        os.replace(part, cache)
    except OSError:  # a read-only folder: the index is rebuilt next time
        part.unlink(missing_ok=True)
