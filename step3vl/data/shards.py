"""WebDataset shards: plain tars that hold `<key>.json` and `<key>.0.png`, `<key>.1.png` ... for each sample.

Writing is byte-for-byte repeatable. Reading is random access through the index of `step3vl.data.tar_index`: bytes are
compared with their checksum, decoders are listed, members and pixels are capped, nothing is unpickled, and keys never
become paths.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from step3vl.data.decode import image_size, open_image
from step3vl.data.preferences import from_json, to_json
from step3vl.data.schema import image_member
from step3vl.data.tar_index import IMAGE_EXTENSIONS, INDEX, ShardError, ShardIndex, checksum, index_shard, publish
from step3vl.types import Sample, Size

if TYPE_CHECKING:
    from step3vl.data.processor import Processor

__all__ = [
    "AlteredError",
    "SampleError",
    "ShardError",
    "ShardIndex",
    "ShardInfo",
    "ShardReader",
    "find_shards",
    "index_shard",
    "write_shards",
]

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
assert tuple(FORMATS) == IMAGE_EXTENSIONS


class SampleError(ValueError):
    """One sample cannot be used; the sentence names shard, key and reason."""


class AlteredError(SampleError):
    """The bytes of a sample cannot be read, or are not those that were indexed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One written shard. num_turns counts assistant messages; num_text_bytes is the UTF-8 length of all messages."""

    file: str
    num_samples: int
    num_turns: int
    num_images: int
    num_text_bytes: int
    sha256: str
    size_bytes: int


# ------------------------------------------------------------------------------------------------ writing


WithFiles = tuple[Sample, Sequence[bytes]]
"""A sample and the encoded files of its images (PNG, JPEG or WebP), in order."""


def write_shards(
    samples: Iterable[Sample | WithFiles], folder: str | Path, stem: str, samples_per_shard: int, first_number: int = 0
) -> list[ShardInfo]:
    """Write `<folder>/<stem>-000000.tar`, `-000001.tar` ... The same samples give identical bytes.

    Each shard is written under a temporary name and renamed when whole; its index, with checksums of the bytes in
    memory, follows. Images are stored as PNG, but those opened from JPEG files as JPEG; where a sample comes with its
    images' files, those are stored byte for byte.
    Raises ValueError for samples_per_shard < 1, a stem that is a path, or two samples of a shard with the same key.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    if stem != Path(stem).name:
        raise ValueError(f"stem must be a plain file name, got {stem!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(samples)
    infos: list[ShardInfo] = []
    for first in stream:
        infos.append(
            _write_one(first, stream, folder / f"{stem}-{first_number + len(infos):06d}.tar", samples_per_shard)
        )
    return infos


def _write_one(first: Sample | WithFiles, rest: Iterator[Sample | WithFiles], path: Path, limit: int) -> ShardInfo:
    from webdataset import TarWriter

    part = path.with_name(f".{path.name}.part")
    checksums: dict[str, int] = {}  # by key
    num_turns = num_images = num_text_bytes = 0
    try:
        with part.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="step3vl", group="step3vl") as tar:
            item: Sample | WithFiles | None = first
            while item is not None:
                sample, files = item if isinstance(item, tuple) else (item, None)
                key = safe_key(sample.id)
                if key in checksums:
                    raise ValueError(f"{path}: two samples have the key {key!r} (id {sample.id!r}); ids must differ")
                members = _members(sample, files, f"{path.name}:{key}")
                tar.write({"__key__": key, **members})
                checksums[key] = checksum(members[name] for name in sorted(members))  # as TarWriter orders them
                num_turns += sum(message.role == "assistant" for message in sample.messages)
                num_images += len(sample.images)
                num_text_bytes += sum(len(message.content.encode()) for message in sample.messages)
                item = next(rest, None) if len(checksums) < limit else None
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        publish(part, path, checksums)
    finally:
        part.unlink(missing_ok=True)
    return ShardInfo(
        file=path.name,
        num_samples=len(checksums),
        num_turns=num_turns,
        num_images=num_images,
        num_text_bytes=num_text_bytes,
        sha256=digest,
        size_bytes=path.stat().st_size,
    )


def _members(sample: Sample, files: Sequence[bytes] | None, where: str) -> dict[str, bytes]:
    row = to_json(sample)
    if files is not None:
        row["images"] = [f"{k}.{stored_as(data)}" for k, data in enumerate(files)]
        if None in map(stored_as, files):
            raise ValueError(f"{where}: image files must be PNG, JPEG or WebP, found {row['images']}")
    from_json(row, sample.images, where)  # what is written must be readable
    members = {"json": json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()}
    if files is not None:
        return members | dict(zip(row["images"], files, strict=True))
    for k, image in enumerate(sample.images):
        buffer = io.BytesIO()
        if image.format == "JPEG":  # with its own tables, so that nothing more is lost
            image.save(buffer, "JPEG", quality="keep")
        else:
            (image if image.mode in ("RGB", "L") else image.convert("RGB")).save(buffer, "PNG", compress_level=3)
        members[image_member(k, image)] = buffer.getvalue()
    return members


def stored_as(data: bytes) -> str | None:
    """The extension under which an encoded image may lie in a shard as it is: png, jpg or webp; None for the rest."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def safe_key(name: str) -> str:
    """A sample id as a tar member name: letters, digits, '_' and '-' only, at most 80."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]
    if not key:
        raise ValueError("a sample has an empty id")
    return key


# ------------------------------------------------------------------------------------------------ reading


class ShardReader:
    """Random access to the samples of one shard. Cheap to pickle; processes may share one.

    strict: raise ShardError on a damaged shard. Otherwise its whole samples are served, and `reader.index.damage` and
    `reader.index.broken` say what is missing.

    Example: ShardReader("corpus/train/text-sums-level0-000000.tar").read(0)
    """

    def __init__(self, path: str | Path, strict: bool = True) -> None:
        self.path = Path(path)
        self.index = index_shard(self.path, strict=strict)
        self._file: io.FileIO | None = None

    def __len__(self) -> int:
        return len(self.index.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def key(self, i: int) -> str:
        """Key of sample i, without reading it."""
        return self.index.samples[i][0]

    def members(self, i: int) -> dict[str, bytes]:
        """The stored bytes of sample i, by extension. Raises AlteredError when they are not those that were indexed."""
        key, places = self.index.samples[i]
        try:
            if self._file is None:
                self._file = io.FileIO(self.path)
            file = self._file.fileno()  # read without a position, which forked workers would share
            members = {name: os.pread(file, size, offset) for name, (offset, size) in places.items()}
        except OSError as error:
            raise AlteredError(f"{self.path}:{key}: cannot be read ({error.strerror})") from error
        if checksum(members.values()) != self.index.checksums[i]:
            raise AlteredError(
                f"{self.path}:{key}: its bytes differ from their checksum in {self.path.name}{INDEX}; the shard is "
                "damaged, or it was rewritten on purpose: then delete that file"
            )
        return members

    def row(self, i: int) -> dict[str, Any]:
        """The stored JSON of sample i, without decoding its images."""
        return self._row(i, self.members(i))

    def read(self, i: int) -> Sample:
        """Sample i with its images as RGB. Raises SampleError when it is altered, undecodable or breaks the schema."""
        where = f"{self.path}:{self.key(i)}"
        members = self.members(i)
        row = self._row(i, members)
        names = row.get("images") or []
        if not isinstance(names, list) or any(name not in members for name in map(str, names)):
            raise SampleError(f"{where}: field 'images' names members the shard does not hold: {names!r}")
        images = [_image(str(name), members[str(name)], where) for name in names]
        try:
            return from_json(row, images, where)
        except ValueError as error:
            raise SampleError(str(error)) from error

    def measure(self, i: int, processor: Processor) -> Size:
        """What sample i costs, from its text and its images' headers. Raises SampleError like `read`."""
        where = f"{self.path}:{self.key(i)}"
        members = self.members(i)
        row = self._row(i, members)
        names = [str(name) for name in row.get("images") or []]
        try:
            headers = [(f"{where}: image '{name}'", members[name]) for name in names]
            sizes = [image_size(data, place, (FORMATS[place[:-1].rpartition(".")[2]],)) for place, data in headers]
            blanks = [Image.new("1", (1, 1))] * len(sizes)  # how many there are is what is checked
            return processor.measure(from_json(row, blanks, where).messages, sizes, row["id"])
        except (ValueError, KeyError) as error:
            raise SampleError(f"{where}: {error}") from error

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(i) for i in range(len(self)))

    def _row(self, i: int, members: dict[str, bytes]) -> dict[str, Any]:
        try:
            row = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{self.path}:{self.key(i)}: the JSON cannot be parsed ({error})") from error
        if not isinstance(row, dict):
            raise SampleError(f"{self.path}:{self.key(i)}: the JSON must be an object, found {type(row).__name__}")
        return row


def _image(name: str, data: bytes, where: str) -> Image.Image:
    accepted = FORMATS.get(name.rpartition(".")[2])
    if accepted is None:
        raise SampleError(f"{where}: image '{name}' has no accepted extension ({', '.join(FORMATS)})")
    try:
        return open_image(data, f"{where}: image '{name}'", (accepted,))
    except ValueError as error:
        raise SampleError(str(error)) from error


def find_shards(pattern: str | Path) -> list[Path]:
    """Sorted shards that match a glob (`**` reaches into folders) or lie in a folder. Plain files only, never a pipe.

    A shard of which only the index is left is among them, so that its loss is noticed.

    Raises ValueError that names the pattern and what its folder holds instead.
    """
    path = Path(pattern)
    wanted = str(path / "*.tar" if path.is_dir() else pattern)
    files = [shard for shard in map(Path, glob.glob(wanted, recursive=True)) if shard.is_file()]
    indexed = [Path(name.removesuffix(INDEX)) for name in glob.glob(wanted + INDEX, recursive=True)]
    shards = sorted({shard for shard in files if shard.suffix not in (".json", ".npy")} | set(indexed))
    if not shards:
        folder = path if path.is_dir() else path.parent
        if folder.is_dir():
            names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            inside = f"the folder {folder} holds {', '.join(names[:6]) + more if names else 'nothing'}"
        else:
            inside = f"the folder {folder} does not exist"
        raise ValueError(f"no shards match '{pattern}'; {inside}")
    return shards
