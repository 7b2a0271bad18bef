"""From a source to samples: which files, which format, and one pass over all records."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from step3vl.data.importers import hub, llava, preference, qwenvl, sharegpt
from step3vl.data.importers.build import Builder, Labels
from step3vl.data.importers.json_stream import read_json
from step3vl.data.importers.parquet import read_parquet
from step3vl.data.importers.pictures import Pictures
from step3vl.data.importers.record import Place, Raw, Record, Refused, is_empty, shown
from step3vl.data.importers.report import Report
from step3vl.data.shards import WithFiles

READERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "llava": llava.read_llava,
    "sharegpt": sharegpt.read_sharegpt,
    "qwenvl": qwenvl.read_qwenvl,
    "parquet": hub.read_hub,
    "preference": preference.read_preference,
}
FIELDS = tuple(dict.fromkeys((*llava.FIELDS, *sharegpt.FIELDS, *qwenvl.FIELDS, *hub.FIELDS, *preference.FIELDS)))
TURNS = ("system", "conversations", "messages", "texts", "question", "answer", "prompt", "chosen", "rejected")
MAPPABLE = ("id", "image", "images", *TURNS, "margin")
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".parquet")
PACKED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5\x2f\xfd": "zstandard", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
PEEK = 100
"""Records looked at to tell the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a source is read."""

    format: str = "auto"
    images: Path | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field -> the source's."""
    limit: int | None = None
    """Read so many records and no more."""

    def __post_init__(self) -> None:
        if self.format not in ("auto", *READERS):
            raise ValueError(f"--format {self.format}: accepted are auto, {', '.join(READERS)}")
        for name in self.mapping:
            if name not in MAPPABLE:
                raise ValueError(f"--map {name}={self.mapping[name]}: {name!r} is none of {', '.join(MAPPABLE)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {self.limit}")


def source_files(source: str | Path) -> list[Path]:
    """The files of a source: a file, a folder with files of one kind, or a pattern. Sorted. Raises ValueError."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in EXTENSIONS and entry.is_file())
        kinds = sorted({"parquet" if entry.suffix.lower() == ".parquet" else "JSON" for entry in found})
        if len(kinds) == 2:
            raise ValueError(f"{path} holds JSON and parquet files; name one kind, for example '{path}/*.parquet'")
        if not found:
            names = sorted(entry.name + "/" * entry.is_dir() for entry in islice(path.iterdir(), 1000))
            inside = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
            raise ValueError(f"{path} holds no {', '.join(EXTENSIONS)} files; it holds {inside}")
        return found
    found = sorted(entry for entry in map(Path, glob.glob(str(source), recursive=True)) if entry.is_file())
    if not found:
        raise ValueError(f"{source}: there is no such file or folder, and it matches no file as a pattern")
    return found


def raw_records(path: Path, mapping: Mapping[str, str]) -> Iterator[Raw]:
    """The records of one file; its content decides how it is read. Raises ValueError when it is no JSON or parquet."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error.strerror or error}") from None
    for magic, name in PACKED.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is packed with {name}; unpack it first")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 text; accepted is UTF-8")
    if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return read_parquet(path, {*FIELDS, *mapping.values()}, mapping.values())
    return read_json(path)


def settle_format(files: list[Path], options: Options) -> str:
    """The format to read a source with. Raises ValueError when its first file cannot be read at all."""
    if options.format == "auto":
        return detect(files[0], options.mapping)
    for _ in islice(raw_records(files[0], options.mapping), 1):
        pass
    return options.format


def detect(path: Path, mapping: Mapping[str, str]) -> str:
    """The format of a file by its first record that is an object. Raises ValueError that names the fields found."""
    first: dict[str, Any] | None = None
    sentence = "it holds no records"
    for raw in islice(raw_records(path, mapping), PEEK):
        if raw.problem is not None:
            sentence = str(raw.problem)
        elif not isinstance(raw.value, dict):
            sentence = f"its first record is {shown(raw.value)}, not an object"
        else:
            first = renamed(raw.value | dict.fromkeys(raw.skipped_fields), mapping)
            break
    if first is None:
        raise ValueError(f"{path}: no record can be read: {sentence}")
    found = _format_of(first, "row" if raw.place.row is not None else "line")
    if found is None:
        names = ", ".join(str(name) for name in list(first)[:12]) or "none"
        for name, value in first.items():
            if isinstance(value, list) and value and isinstance(value[0], dict) and _format_of(value[0], "line"):
                raise ValueError(f"{path}: the records lie in the field {name!r}; accepted is that array alone")
        raise ValueError(
            f"{path}: the fields of the first record fit no format: {names}; needed are conversations, messages, "
            "texts, or question and answer (name them with --map, for example --map question=prompt --map answer=label)"
        )
    return found


def _format_of(value: dict[str, Any], kind: str) -> str | None:
    messages, conversations = value.get("messages"), value.get("conversations")
    if all(name in value for name in preference.ANSWERS):
        return "preference"
    if kind == "row":
        return "parquet" if any(name in value for name in hub.TURN_FIELDS) else None
    for turns in (messages, conversations):
        if isinstance(turns, list) and any(isinstance(t, dict) and isinstance(t.get("content"), list) for t in turns):
            return "qwenvl"
    if conversations and isinstance(value.get("image"), list):
        return "qwenvl"
    if isinstance(conversations, list) and conversations and isinstance(conversations[0], dict):
        plain = "from" in conversations[0] and not any(name in value for name in ("images", "system", "tools"))
        return "llava" if plain else "sharegpt"
    if not is_empty(messages) or not is_empty(conversations):
        return "sharegpt"
    return "parquet" if any(not is_empty(value.get(name)) for name in hub.TURN_FIELDS) else None


def renamed(value: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The record with its fields under our names."""
    if not mapping:
        return value
    taken = {theirs: ours for ours, theirs in mapping.items()}
    out = {name: found for name, found in value.items() if name not in taken and name not in mapping}
    return out | {taken[name]: found for name, found in value.items() if name in taken}


def samples(
    files: list[Path],
    format: str,
    options: Options,
    labels: Labels,
    report: Report,
    done: Callable[[float], None] = lambda share: None,
    enough: int | None = None,
) -> Iterator[WithFiles]:
    """Every record as a sample with its images' files; refused ones go to the report.

    `done` hears the share read. enough: stop when so many records were refused and none was sound.
    """
    builder = Builder(labels, Pictures(options.images), several=len(files) > 1)
    num_left = options.limit
    unseen = set(options.mapping.values())
    for number, path in enumerate(files):
        try:
            for raw in raw_records(path, options.mapping):
                if num_left is not None and num_left <= 0:
                    return
                if enough is not None and report.num_sound == 0 and report.num_refused >= enough:
                    report.remarks.append(f"stopped early, because the first {report.num_refused:,} were all refused")
                    return
                num_left = num_left if num_left is None else num_left - raw.num
                done((number + raw.done) / len(files))
                report.remarks += [raw.unread] if raw.unread else []
                if unseen and isinstance(raw.value, dict):
                    unseen.difference_update(raw.value, raw.skipped_fields)
                try:
                    sample = _sample(raw, format, options, builder, number, report)
                except Refused as problem:
                    report.refuse(raw.place, problem, raw.num)
                    continue
                report.num_sound += 1
                yield sample
        except (ValueError, OSError) as error:
            sentence = str(error).removeprefix(f"{path}: ")
            report.refuse(Place(file=str(path)), Refused("file unreadable", sentence))
            report.remarks.append(f"{path} was not read to its end")
    report.remarks += [f"no record has the field {name!r} of --map" for name in sorted(unseen)]


def _sample(raw: Raw, format: str, options: Options, builder: Builder, number: int, report: Report) -> WithFiles:
    if raw.problem is not None:
        raise raw.problem
    if isinstance(raw.value, list):
        raise Refused("not an object", "the record is a list; packed records cannot be imported, give them one by one")
    if not isinstance(raw.value, dict):
        raise Refused("not an object", f"the record must be an object, found {shown(raw.value)}")
    value = renamed(raw.value | dict.fromkeys(raw.skipped_fields), options.mapping)
    record = READERS[format](value)
    sample = builder.build(record, raw.place, value, number)
    record.notes.update({f"field not imported: {name}": 1 for name in raw.skipped_fields})
    report.note(record.notes)
    return sample
