"""Parquet files as a stream of records: a few rows at a time, and only the columns some format reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from step3vl.data.importers.record import Place, Raw, Refused

ROWS_AT_ONCE = 16
PICTURE_NAME = re.compile(r"image|img|picture|photo", re.IGNORECASE)
"""Columns of such a name are loaded too, so that a picture in a column nobody reads is noticed."""


def read_parquet(path: Path, columns: Collection[str], needed: Collection[str] = ()) -> Iterator[Raw]:
    """The rows of a parquet file, with those of `columns` it has.

    A row or row group that cannot be decoded comes as a Raw with a problem. Raises ValueError when pyarrow is not
    installed, when the file is no whole parquet file, or when it lacks one of the columns `needed`.
    """
    pyarrow, parquet = _pyarrow()
    try:
        file = parquet.ParquetFile(path, buffer_size=2**20)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as parquet: {_first_line(error)}") from None
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} cannot be read as parquet, so it is cut short or damaged: {_first_line(error)}"
        ) from None
    with file:
        names = list(file.schema_arrow.names)
        for name in needed:
            if name not in names:
                raise ValueError(f"{path} has no column {name!r} (--map); its columns are {', '.join(names)}")
        wanted = [name for name in names if name in columns or PICTURE_NAME.search(name)]
        skipped = tuple(name for name in names if name not in wanted)
        num_rows, row = max(1, file.metadata.num_rows), 0
        for group in range(file.num_row_groups):
            stop = row + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                    for raw in _rows(batch, str(path), group, row):
                        raw.skipped_fields, raw.done = skipped, (row + 1) / num_rows
                        yield raw
                        row += 1
            except (pyarrow.ArrowException, OSError) as error:
                sentence = f"rows {row} to {stop - 1} cannot be read, the row group is damaged: {_first_line(error)}"
                place = Place(file=str(path), row_group=group, row=row)
                yield Raw(place=place, problem=Refused("file cut short or damaged", sentence), num=stop - row)
            row = stop


def _rows(batch: Any, file: str, group: int, first: int) -> Iterator[Raw]:
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError):  # one bad text spoils the batch: row by row then
        values = None
    for k in range(batch.num_rows):
        place = Place(file=file, row_group=group, row=first + k)
        try:
            yield Raw(place=place, value=values[k] if values is not None else batch.slice(k, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            yield Raw(place=place, problem=Refused("not UTF-8", f"a text of the row is not UTF-8: {error.reason}"))
        except (ValueError, OverflowError) as error:
            yield Raw(place=place, problem=Refused("row unreadable", f"the row cannot be read: {_first_line(error)}"))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet needs pyarrow, which is not installed: pip install -e '.[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(". ")
