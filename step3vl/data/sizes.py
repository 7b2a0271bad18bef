"""What every sample of a shard costs (tokens, learnt tokens, views), measured once and kept beside the shard.

Packing whole runs ahead, counting a mixture in tokens and giving ranks equal work need these numbers before any pixel
is decoded. They depend on the processor, so each processor has its own file, named by its fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_hexdigest

from step3vl.data.processor import Processor
from step3vl.data.shards import AlteredError, SampleError, ShardReader
from step3vl.data.tar_index import index_file, index_shard
from step3vl.types import Size

DTYPE = np.dtype(list(zip(Size._fields, ("<i4", "<i4", "<u2", "<u2"))))
"""12 bytes a sample; every rank holds those of all samples in memory."""
UNUSABLE = -1
"""num_tokens of a sample that cannot be encoded; reading it says why."""


def shard_sizes(path: str | Path, processor: Processor) -> np.ndarray:
    """Sizes of the usable samples of a shard, in its order; measured now when they are not kept yet.

    Returns: a read-only array with the fields of `Size`, mapped from the file, so that ranks of one machine share it.
    """
    path = Path(path)
    cache = cache_file(path, processor.fingerprint)
    try:
        return np.load(cache, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return _measure(path, processor, cache)


def measure_shards(
    paths: Sequence[Path], processor: Processor, num_processes: int = 1, done: Callable[[int], None] = lambda n: None
) -> int:
    """Measure the shards that were not measured yet; `done` hears how many of them are. Returns their number."""
    missing = [path for path in paths if not cache_file(path, processor.fingerprint).exists()]
    if num_processes < 2 or len(missing) < 2:
        for n, path in enumerate(missing, 1):
            shard_sizes(path, processor)
            done(n)
        return len(missing)
    with ProcessPoolExecutor(min(num_processes, len(missing))) as pool:
        for n, _ in enumerate(pool.map(partial(_only_measure, processor=processor), missing), 1):
            done(n)
    return len(missing)


def cache_file(path: Path, fingerprint: str) -> Path:
    """Where sizes are kept: the name changes with the processor and with the shard's index, not with a copy of both."""
    place = index_file(path)
    if not place.exists():
        index_shard(path, strict=False)
    try:
        index = place.read_bytes()
    except OSError:  # a read-only folder without an index
        index = str(path.stat()).encode()
    stamp = xxh3_64_hexdigest(str(DTYPE).encode() + index)[:8]
    return path.with_name(f"{path.name}.{fingerprint}-{stamp}.sizes.npy")


def _only_measure(path: Path, processor: Processor) -> None:
    shard_sizes(path, processor)


def _measure(path: Path, processor: Processor, cache: Path) -> np.ndarray:
    reader = ShardReader(path, strict=False)
    sizes, is_altered = np.zeros(len(reader), DTYPE), False
    for i in range(len(reader)):
        try:
            sizes[i] = reader.measure(i, processor)
        except SampleError as error:
            sizes[i] = (UNUSABLE, 0, 0, 0)
            is_altered = is_altered or isinstance(error, AlteredError)
    for stale in path.parent.glob(f"{path.name}.{processor.fingerprint}-*.sizes.npy"):
        stale.unlink(missing_ok=True)
    if is_altered:  # the sound shard may come back: measured again next time
        return sizes
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.save(file, sizes, allow_pickle=False)
        os.replace(part, cache)
    except OSError:  # a read-only folder: measured again next time
        part.unlink(missing_ok=True)
    return sizes
