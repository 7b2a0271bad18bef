"""JSON sources as a stream of records with their line numbers; never more than one record in memory.

Three shapes are told apart by their content: one record a line, one array of records, and records one after another
over several lines. In an array the ends of records are found by brackets and strings alone, so a record that is not
JSON is refused by itself and reading goes on behind it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from step3vl.data.importers.record import Place, Raw, Refused

CHUNK_BYTES = 2**20
MAX_RECORD_BYTES = 64 * 2**20
"""Longest record accepted: text and images written into it as base64."""
BOM = b"\xef\xbb\xbf"

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[{}\[\]]', re.DOTALL)
"""A string (group 1 is empty where the data end before its closing quote) or a bracket."""
_SCALAR = re.compile(rb'[^\s,\[\]{}"]+')
_GAP = re.compile(rb"[\s,]*")


class _Unreadable(Exception):
    """From here on the file makes no sense; the text says why."""


def read_json(path: Path) -> Iterator[Raw]:
    """The records of a .json or .jsonl file. What cannot be parsed comes as a Raw with a problem, never as an error.

    Raises ValueError when the file cannot be opened or its first character begins neither an object nor an array.
    """
    try:
        size = max(1, os.path.getsize(path))
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or error}") from None
    with file:
        start, line, first = _first_byte(file)
        if first not in (b"{", b"["):
            file.seek(start)
            found = f"begins with {file.read(16)!r}" if first else "holds nothing"
            raise ValueError(
                f"{path} {found}; accepted are a JSON array of records, one JSON record a line, and parquet"
            )
        file.seek(start)
        if first == b"{" and _one_a_line(path, file):
            file.seek(start)
            yield from _lines(path, file, line, size)
        else:
            file.seek(start)
            yield from _elements(path, _Scanner(file, line), size)


def _first_byte(file: BinaryIO) -> tuple[int, int, bytes]:
    """Offset, line and value of the first byte that is not white space; b"" in a file without one."""
    offset = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(offset)
    line = 1
    while chunk := file.read(CHUNK_BYTES):
        rest = chunk.lstrip()
        num_blank = len(chunk) - len(rest)
        line += chunk.count(b"\n", 0, num_blank)
        if rest:
            return offset + num_blank, line, rest[:1]
        offset += len(chunk)
    return offset, line, b""


def _one_a_line(path: Path, file: BinaryIO) -> bool:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    return file.readline(MAX_RECORD_BYTES).rstrip().endswith(b"}")


def _lines(path: Path, file: BinaryIO, line: int, size: int) -> Iterator[Raw]:
    while data := file.readline(MAX_RECORD_BYTES + 1):
        place = Place(file=str(path), line=line)
        if len(data) > MAX_RECORD_BYTES:
            while data and not data.endswith(b"\n"):
                data = file.readline(CHUNK_BYTES)
            limit = f"the line is longer than the limit of {MAX_RECORD_BYTES} bytes for a record"
            yield Raw(place=place, problem=Refused("record too long", limit), done=file.tell() / size)
        elif data.strip():
            yield _record(place, data, file.tell() / size)
        line += 1


def _elements(path: Path, scanner: _Scanner, size: int) -> Iterator[Raw]:
    num_records, line = 0, scanner.line
    try:
        is_array = scanner.open_array()
        while True:
            scanner.skip_gap()
            line = scanner.line
            if is_array and scanner.close_array():
                return
            if scanner.at_end():
                if is_array:
                    raise _Unreadable("the file ends before its array is closed with ']'")
                return
            data = scanner.element()
            num_records += 1
            yield _record(Place(file=str(path), line=line), data, scanner.file.tell() / size)
    except _Unreadable as error:
        yield Raw(
            place=Place(file=str(path), line=line),
            problem=Refused("file cut short or damaged", str(error)),
            unread=f"{path} was not read past line {line}",
            done=1.0,
        )


def _record(place: Place, data: bytes, done: float) -> Raw:
    try:
        return Raw(place=place, value=_parse(place, data), done=done)
    except Refused as problem:
        return Raw(place=place, problem=problem, done=done)


def _parse(place: Place, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = (place.line or 1) + data.count(b"\n", 0, error.start)
        raise Refused("not UTF-8", f"the text is not UTF-8: byte {data[error.start]:#04x} on line {at}") from None
    except json.JSONDecodeError as error:
        fault = f"{error.msg[0].lower() + error.msg[1:]} at line {(place.line or 1) + error.lineno - 1}"
        raise Refused("not JSON", f"the record is not JSON: {fault}, column {error.colno}") from None
    except RecursionError:
        raise Refused("not JSON", "the record is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise Refused("not JSON", f"the record is not usable JSON: {error}") from None


class _Scanner:
    """A window over the file, one element at a time. `line` is the line of the next byte."""

    def __init__(self, file: BinaryIO, line: int):
        self.file = file
        self.line = line
        self._data = b""
        self._at = 0

    def open_array(self) -> bool:
        if self.at_end() or self._data[self._at : self._at + 1] != b"[":
            return False
        self._take(self._at + 1)
        return True

    def close_array(self) -> bool:
        """True behind the final bracket. Raises _Unreadable when anything follows it."""
        if self.at_end() or self._data[self._at : self._at + 1] != b"]":
            return False
        self._take(self._at + 1)
        self.skip_gap()
        if not self.at_end():
            raise _Unreadable("the array ends, but more data follow; one file holds one array of records")
        return True

    def at_end(self) -> bool:
        return self._at >= len(self._data) and not self._more()

    def skip_gap(self) -> None:
        """Over white space and commas."""
        while not self.at_end():
            end = self._end_of(_GAP)
            stop = end < len(self._data)
            self._take(end)
            if stop:
                return

    def element(self) -> bytes:
        """The bytes of the next object, array, string or scalar. Raises _Unreadable when it has no end."""
        first = self._data[self._at : self._at + 1]
        if first not in (b"{", b"[", b'"'):
            while (end := self._end_of(_SCALAR)) == len(self._data) and self._more():
                pass
            if end == self._at:
                raise _Unreadable(f"found {first.decode('ascii', 'replace')!r} where a record should begin")
            return self._take(end)
        depth, done = 0, 0  # done counts from self._at, which moves when more is read
        while True:
            complete = True
            for token in _TOKEN.finditer(self._data, self._at + done):
                kind = token[0][:1]
                if kind == b'"' and not token[1]:
                    complete, done = False, token.start() - self._at
                    break
                depth += (kind in b"{[") - (kind in b"}]")
                if depth == 0:
                    return self._take(token.end())
            if complete:
                done = len(self._data) - self._at
            if len(self._data) - self._at > MAX_RECORD_BYTES:
                raise _Unreadable(f"the record that begins here does not end within {MAX_RECORD_BYTES} bytes")
            if not self._more():
                raise _Unreadable("the file ends inside the record that begins here")

    def _end_of(self, pattern: re.Pattern[bytes]) -> int:
        found = pattern.match(self._data, self._at)
        return found.end() if found else self._at

    def _take(self, end: int) -> bytes:
        data = self._data[self._at : end]
        self.line += data.count(b"\n")
        self._at = end
        return data

    def _more(self) -> bool:
        """Read on; as much again as is waiting, so that a long record costs linear time."""
        rest = self._data[self._at :]
        chunk = self.file.read(max(CHUNK_BYTES, len(rest)))
        self._data, self._at = rest + chunk, 0
        return bool(chunk)
