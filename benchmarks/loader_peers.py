"""The same samples in the formats of litdata and mosaic streaming, where those are installed.

Both declare packages that reading bytes does not need: install them with `pip install --no-deps`. Samples are stored as
they are (bytes of a JSON and of a JPEG), without compression, in one folder; nothing is shuffled, nothing downloaded.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from step3vl.data.malloc import worker_init

Row = tuple[str, dict[str, bytes]]
"""Key, and members by extension."""


class LitData:
    """litdata's StreamingDataset over its own chunks."""

    module = "litdata"

    def __init__(self, folder: Path, rows: Iterable[Row]) -> None:
        from litdata.streaming.writer import BinaryWriter

        self.folder = folder
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for k, (key, members) in enumerate(rows):
            writer[k] = {"__key__": key, **members}
        writer.done()
        writer.merge()

    def dataset(self) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(self.folder), shuffle=False)


class Mosaic:
    """mosaic streaming's StreamingDataset over MDS shards."""

    module = "streaming"

    def __init__(self, folder: Path, rows: Iterable[Row]) -> None:
        from streaming import MDSWriter

        self.folder = folder
        columns = {"__key__": "str", "json": "bytes", "0.jpg": "bytes"}
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for key, members in rows:
                writer.write({"__key__": key, **members})

    def dataset(self) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # of the round before: two data sets of one folder are refused
        return StreamingDataset(local=str(self.folder), shuffle=False, batch_size=1)


def installed() -> list[type[LitData] | type[Mosaic]]:
    """The peers that can be imported."""
    found: list[type[LitData] | type[Mosaic]] = []
    sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))  # needs torchvision; not used
    for peer in (LitData, Mosaic):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(peer.module)
            found.append(peer)
        except ImportError:
            continue
    return found


def rows_of(dataset: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for found in dataset:
        key = found.pop("__key__")
        yield key, found


def receive_lists(dataset: Any, samples_per_batch: int) -> tuple[int, int]:
    """Samples and bytes that arrive from two workers in lists of samples."""
    num = size = 0
    for batch in DataLoader(dataset, samples_per_batch, num_workers=2, collate_fn=list, worker_init_fn=worker_init):
        for _, members in rows_of(batch):
            num, size = num + 1, size + sum(map(len, members.values()))
    return num, size
