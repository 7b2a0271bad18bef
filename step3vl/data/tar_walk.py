"""The headers of a tar, one after another: which members lie where, and at which byte something is wrong.

Everything is checked before it is believed, and after damage the walk goes on at the next sound header.
"""

from __future__ import annotations

from typing import BinaryIO

BLOCK = 512
MAX_MEMBER_BYTES = 64 * 2**20

Members = dict[str, tuple[int, int]]
"""Extension -> (offset, size) in bytes."""


class _Damage(Exception):
    """Raised inside the walk; the text says what is wrong at which byte."""


def walk(file: BinaryIO, size: int, members: dict[str, Members], broken: dict[str, str]) -> str | None:
    """Fill `members` from the headers; goes on at the next sound header after damage. Returns what is wrong, if any."""
    offset = 0
    long_name: str | None = None
    damage: list[str] = []
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        try:
            if len(header) < BLOCK:
                raise _Damage(f"truncated at byte {offset}: the end-of-archive mark is missing")
            if header == bytes(BLOCK):
                _expect_end(file, offset)
                break
            length = _check_header(header, offset)
            start, kind = offset + BLOCK, header[156:157]
            if start + length > size:
                missing = start + length - size
                raise _Damage(f"truncated at byte {size}: the member at byte {offset} needs {missing} more")
        except _Damage as error:
            damage.append(str(error))
            following = _next_header(file, offset + BLOCK)
            if following is None:
                break
            offset, long_name = following, None
            continue
        offset = start + -(-length // BLOCK) * BLOCK
        if kind in (b"x", b"L"):  # the next member's long name
            if length > 2**16:
                damage.append(f"a name of {length} bytes at byte {start}")
                continue
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
    return damage[0] + (f" (and {len(damage) - 1} more)" if len(damage) > 1 else "") if damage else None


def _next_header(file: BinaryIO, offset: int) -> int | None:
    """Byte of the first sound tar header from `offset` on, in steps of 512; None: there is none."""
    file.seek(offset)
    while chunk := file.read(2**20):
        for at in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk.startswith(b"ustar", at + 257):
                try:
                    _check_header(chunk[at : at + BLOCK], offset + at)
                    return offset + at
                except _Damage:
                    continue
        offset += len(chunk)
    return None


def _check_header(header: bytes, offset: int) -> int:
    """Size in bytes of the member whose 512-byte header this is."""
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
        length = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damage(f"no tar header at byte {offset}") from None
    if length < 0 or stated != sum(header) - sum(header[148:156]) + 8 * 32:
        raise _Damage(f"wrong checksum in the tar header at byte {offset}")
    return length


def _expect_end(file: BinaryIO, offset: int) -> None:
    """After the first block of zeros only zeros may follow; anything else is an overwritten header."""
    while chunk := file.read(2**16):
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
