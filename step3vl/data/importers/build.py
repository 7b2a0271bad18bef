"""A record becomes a sample: images loaded, marks settled, an id of its own, and the schema's checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from step3vl.data.importers.parquet import PICTURE_NAME
from step3vl.data.importers.pictures import Pictures
from step3vl.data.importers.record import Place, Record, Refused, is_empty, shown
from step3vl.data.preferences import Preference, from_json, to_json
from step3vl.data.schema import LEVELS
from step3vl.data.shards import WithFiles, safe_key
from step3vl.data.tar_index import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES
from step3vl.types import IMAGE_MARK, Message, Sample

KEY_LENGTH = 80
MARKS_ADDED = "records with <image> marks added in front of the first user turn"
IDS_MADE = "ids made from file and line or row"
IDS_CHANGED = "ids that came twice, made unique"

_OTHER_FILES = (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What every sample of an import is called: the fields no source has. See docs/data_format.md."""

    domain: str
    subset: str
    level: int = 0
    source: str
    licence: str = "unknown"

    def __post_init__(self) -> None:
        for name in ("domain", "subset"):
            value = getattr(self, name)
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", value):
                raise ValueError(f"--{name} {value!r}: accepted are letters, digits, '_', '-' and '.', at most 80")
        if self.level not in LEVELS:
            raise ValueError(f"--level {self.level}: accepted are {', '.join(map(str, LEVELS))}")
        for name in ("source", "licence"):
            value = getattr(self, name)
            if not value.strip() or not value.isprintable():
                raise ValueError(f"--{name} {value!r}: accepted is printable text that is not empty")

    @property
    def stem(self) -> str:
        """Name of the shards, before their number."""
        return f"{self.domain}-{self.subset}-level{self.level}"


class Builder:
    """Makes samples one after another, and remembers their ids.

    Args:
        labels: The fields that no source has.
        pictures: Where images are looked for.
        several: Ids of samples also name their file's number, because there are several files.
    """

    def __init__(self, labels: Labels, pictures: Pictures, several: bool = False):
        self.labels = labels
        self.pictures = pictures
        self.several = several
        self._keys: set[int] = set()  # 8-byte digests: about 70 MB a million samples

    def build(self, record: Record, place: Place, value: dict[str, Any], file_number: int = 0) -> WithFiles:
        """The sample and its images' files; notes of what was changed go to `record.notes`. Raises Refused."""
        _check_unread(record, value)
        source = Path(place.file)
        loaded = [self.pictures.load(image, _field(name), source) for name, image in record.images]
        _settle_marks(record)
        _check_texts(record)
        sample: Sample = Sample(
            id=self._id(record, place, file_number),
            domain=self.labels.domain,
            subset=self.labels.subset,
            level=self.labels.level,
            messages=record.messages,
            images=[image for image, _ in loaded],
            source=self.labels.source,
            licence=self.labels.licence,
        )
        if record.rejected is not None:
            values = {field.name: getattr(sample, field.name) for field in fields(sample)}
            sample = Preference(**values, rejected=record.rejected, margin=record.margin)
        try:
            from_json(to_json(sample), sample.images, "")
        except ValueError as error:
            raise Refused("schema", str(error).removeprefix(": ")) from None
        for name in value:
            if name not in record.used and not is_empty(value[name]):
                record.notes[f"field not imported: {name}"] += 1
        return sample, [data for _, data in loaded]

    def _id(self, record: Record, place: Place, file_number: int) -> str:
        given = record.id
        tag = f"file{file_number}-{place.tag}" if self.several else place.tag
        if is_empty(given) or given != given:  # None, "", NaN
            record.notes[IDS_MADE] += 1
            id = f"{re.sub(r'[^A-Za-z0-9_-]', '_', Path(place.file).stem)[:40]}-{tag}"
        elif isinstance(given, str | int | float) and not isinstance(given, bool):
            id = str(given)
            _check_utf8(id, "field 'id'")
        else:
            raise Refused("id of the wrong type", f"field 'id' must be text or a number, found {shown(given)}")
        if self._is_new(id):
            return id
        record.notes[IDS_CHANGED] += 1
        n = 1
        while True:
            ending = f"-{tag}" if n == 1 else f"-{tag}-{n}"
            candidate = id[: KEY_LENGTH - len(ending)] + ending
            if self._is_new(candidate):
                return candidate
            n += 1

    def _is_new(self, id: str) -> bool:
        digest = int.from_bytes(blake2b(safe_key(id).encode(), digest_size=8).digest(), "big")
        if digest in self._keys:
            return False
        self._keys.add(digest)
        return True


def _field(name: str) -> str:
    """How a sentence names the place of an image."""
    return f"field '{name}'" if "[" not in name else name


def _settle_marks(record: Record) -> None:
    """As many marks as images; a record with images and no mark at all gets them before the first user turn's text."""
    num_images = len(record.images)
    num_marks = sum(message.content.count(IMAGE_MARK) for message in record.messages)
    if num_images and not num_marks:
        k = next(k for k, message in enumerate(record.messages) if message.role == "user")
        content = IMAGE_MARK * num_images + record.messages[k].content
        record.messages[k] = Message(role="user", content=content)
        record.notes[MARKS_ADDED] += 1
    elif num_marks != num_images:
        raise Refused(
            "image marks",
            f"field '{record.turns_field}' has {num_marks} {IMAGE_MARK} mark{'s' * (num_marks != 1)} for {num_images} "
            f"image{'s' * (num_images != 1)}; accepted are as many marks as images, or no marks at all",
        )


def _check_texts(record: Record) -> None:
    num_bytes = 0 if record.rejected is None else _check_utf8(record.rejected, "field 'rejected'")
    for k, message in enumerate(record.messages):
        num_bytes += _check_utf8(message.content, f"message {k} of '{record.turns_field}'")
    if num_bytes > MAX_MEMBER_BYTES // 4:
        limit = MAX_MEMBER_BYTES // 4
        raise Refused("record too long", f"the texts have {num_bytes} bytes; at most {limit} are accepted")


def _check_utf8(text: str, where: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        found = text[error.start].encode("unicode_escape").decode()
        raise Refused("not UTF-8", f"{where} holds half of a character ({found}), which cannot be stored") from None


def _check_unread(record: Record, value: dict[str, Any]) -> None:
    """An image in a field that no format reads must not get lost: such a record would be learnt as text alone."""
    if record.images:
        return
    for name, found in value.items():
        if name in record.used or is_empty(found) or not PICTURE_NAME.search(str(name)):
            continue
        first = found[0] if isinstance(found, list) else found
        if _is_picture(first):
            raise Refused(
                "image in another field",
                f"field '{name}' is {shown(found)}, an image in a field that is not read; give --map image={name}",
            )


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_picture(value.get(name)) for name in ("bytes", "path"))
    if isinstance(value, bytes):
        return True
    return isinstance(value, str) and _ends_as_picture(value, _OTHER_FILES)


def _ends_as_picture(text: str, extensions: Sequence[str]) -> bool:
    return len(text) < 4096 and text.rpartition(".")[2].lower() in extensions
