"""Checks of data before a run: shards as they are read, and sources as they would be imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from step3vl.data.importers.build import Labels
from step3vl.data.importers.record import Place, Refused
from step3vl.data.importers.report import Report
from step3vl.data.importers.sources import Options, samples, settle_format, source_files
from step3vl.data.shards import SampleError, ShardError, ShardReader, find_shards
from step3vl.data.tar_index import index_shard

NO_LABELS = Labels(domain="none", subset="none", source="none")
"""A dry run is never stored."""


def shards_of(path: Path) -> list[Path]:
    """The shards that a path names: itself, or those in a folder and its subfolders; empty when it names a source."""
    if path.is_dir():
        try:
            return find_shards(path / "**" / "*.tar")
        except ValueError:
            return []
    if path.suffix.lower() == ".tar":
        return find_shards(path)
    return []


def validate_shards(shards: list[Path], report: Report, done: Callable[[float], None] = lambda share: None) -> None:
    """Read every sample of every shard as a run would; what is wrong goes to the report with file and key."""
    for number, path in enumerate(shards):
        try:
            index = index_shard(path, strict=False, again=True)
        except ShardError as error:
            report.refuse(Place(file=str(path)), Refused("damaged shard", _without(str(error), str(path))))
            continue
        if index.damage:
            report.refuse(Place(file=str(path)), Refused("damaged shard", _without(index.damage, str(path))))
        for key, reason in index.broken.items():
            report.refuse(Place(file=str(path), key=key), Refused("unusable members", reason))
        reader = ShardReader(path, strict=False)
        for i in range(len(reader)):
            place = Place(file=str(path), key=reader.key(i))
            try:
                sample = reader.read(i)
                if not any(message.role == "assistant" for message in sample.messages):
                    raise SampleError("field 'messages' has no assistant turn, so there is nothing to learn from it")
                report.num_sound += 1
            except SampleError as error:
                sentence = _without(str(error), str(place))
                report.refuse(place, Refused(_kind(sentence), sentence))
            done((number + (i + 1) / len(reader)) / len(shards))


def validate_source(
    source: str | Path, options: Options, report: Report, done: Callable[[float], None] = lambda share: None
) -> str:
    """A dry run of an import: every record is read and every image decoded, nothing is written. Returns the format.

    Raises ValueError when the source cannot be read at all.
    """
    files = source_files(source)
    format = settle_format(files, options)
    for _ in samples(files, format, options, NO_LABELS, report, done):
        pass
    return format


def _kind(sentence: str) -> str:
    if sentence.startswith("image '"):
        return "image unreadable"
    if sentence.startswith(("its bytes differ", "cannot be read")):
        return "altered"
    named = re.match(r"(?:unknown )?field '(\w+)'|(\w+)\[", sentence)
    return f"field {named[1] or named[2]}" if named else "schema"


def _without(sentence: str, place: str) -> str:
    return sentence.removeprefix(f"{place}: ")
