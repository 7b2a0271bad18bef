"""A mixture of sources as one endless list of samples: position j follows from the seed alone.

Ranks and workers take slices of that list, so the order does not depend on how many there are, and a run resumes from
one integer. Weights hold exactly (to 1/1000) in every aligned stretch of 1,000 samples.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from step3vl.data.shards import ShardError, ShardReader, find_shards, index_shard
from step3vl.data.shuffle import mix, shuffled

if TYPE_CHECKING:
    from rich.table import Table

PERIOD = 1000
"""Samples over which the weights hold exactly."""
MAX_READERS = 64
"""Shards kept open by one process."""


@dataclass(frozen=True, slots=True)
class Source:
    """One ingredient of a mixture.

    Example: Source(shards="train/count-*.tar", weight=3.0)
    """

    shards: str
    """Shards of this source: a glob or a folder, relative to the data root."""
    weight: float
    """How much of the mixture this source is, relative to the other weights."""


class Mixture:
    """Weighted sources under `root`, in an order that `seed` fixes.

    Damaged shards contribute what is whole; `warnings` has a sentence for each. Raises ValueError for no sources, a
    weight that is not above 0 or too small ever to be drawn, a pattern without shards, or a source without samples.
    """

    def __init__(self, root: str | Path, sources: Mapping[str, Source], seed: int = 0):
        if not sources:
            raise ValueError("sources: a mixture needs at least one source, got none")
        self.root, self.seed = Path(root), seed
        self.sources = dict(sources)
        self.warnings: list[str] = []
        self.quotas = _quotas({name: source.weight for name, source in self.sources.items()})
        self._shards: dict[str, list[Path]] = {}
        self._ends: dict[str, list[int]] = {}  # running number of samples after each shard
        for name, source in self.sources.items():
            self._shards[name], counts = self._survey(name, source)
            self._ends[name] = list(accumulate(counts))
        self._periods: OrderedDict[int, list[tuple[str, int]]] = OrderedDict()
        self._readers: OrderedDict[Path, ShardReader] = OrderedDict()

    def num_samples(self, name: str) -> int:
        """Usable samples of a source."""
        if name not in self._ends:
            raise ValueError(f"no source {name!r} in this mixture; it has {', '.join(self.sources)}")
        return self._ends[name][-1]

    def sample(self, j: int) -> tuple[str, ShardReader, int]:
        """Source, shard and index in the shard of global sample j, for any j >= 0."""
        name, draw = self._draw(j)
        n = self.num_samples(name)
        epoch, i = divmod(draw, n)
        place = shuffled(i, n, mix(self.seed, crc32(name.encode()), epoch))
        shard = bisect_right(self._ends[name], place)
        first = self._ends[name][shard - 1] if shard else 0
        return name, self._reader(self._shards[name][shard]), place - first

    def table(self, num_samples: int) -> Table:
        """What a run over `num_samples` samples will see, for printing before it starts."""
        from rich.table import Table

        table = Table(title=f"Mixture: {num_samples:,} samples, seed {self.seed}", title_justify="left")
        for column in ("source", "shards", "samples", "share", "drawn", "epochs"):
            table.add_column(column, justify="left" if column == "source" else "right")
        for name, quota in self.quotas.items():
            n, drawn = self.num_samples(name), num_samples * quota / PERIOD
            cells = (
                f"{len(self._shards[name])}",
                f"{n:,}",
                f"{quota / PERIOD:.1%}",
                f"{drawn:,.0f}",
                f"{drawn / n:.2f}",
            )
            table.add_row(name, *cells)
        if self.warnings:
            table.caption = "\n".join(["Damaged data:", *self.warnings])
            table.caption_justify = "left"
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_periods": OrderedDict()}  # files are opened anew

    # ------------------------------------------------------------------------------------------------ inside

    def _survey(self, name: str, source: Source) -> tuple[list[Path], list[int]]:
        shards, counts = [], []
        try:
            found = find_shards(str(self.root / source.shards))
        except ValueError as error:
            raise ValueError(f"sources.{name}: {error}") from error
        for path in found:
            try:
                index = index_shard(path, strict=False)
            except ShardError as error:
                self.warnings.append(str(error))
                continue
            if index.damage:
                self.warnings.append(index.damage)
            self.warnings += [f"{path}:{key}: {reason}" for key, reason in index.broken.items()]
            if len(index):
                shards.append(path)
                counts.append(len(index))
        if not shards:
            why = f"; {self.warnings[-1]}" if self.warnings else ""
            raise ValueError(f"sources.{name}: no usable sample in {self.root / source.shards}{why}")
        return shards, counts

    def _draw(self, j: int) -> tuple[str, int]:
        """Source of position j, and how many times it was drawn before."""
        if j < 0:
            raise ValueError(f"positions in a mixture start at 0, got {j}")
        period, place = divmod(j, PERIOD)
        if period not in self._periods:
            names = [name for name, quota in self.quotas.items() for _ in range(quota)]
            order = sorted(range(PERIOD), key=lambda i: mix(self.seed, period, i))
            drawn = {name: period * quota for name, quota in self.quotas.items()}
            draws = []
            for i in order:
                draws.append((names[i], drawn[names[i]]))
                drawn[names[i]] += 1
            self._periods[period] = draws
            if len(self._periods) > 4:
                self._periods.popitem(last=False)
        return self._periods[period][place]

    def _reader(self, path: Path) -> ShardReader:
        if path not in self._readers:
            self._readers[path] = ShardReader(path, strict=False)
            if len(self._readers) > MAX_READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(path)
        return self._readers[path]


def _quotas(weights: dict[str, float]) -> dict[str, int]:
    """Samples of each source in a period: shares of PERIOD, rounded by largest remainder."""
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"sources.{name}.weight must be above 0, got {weight}; leave out what is not wanted")
    exact = {name: PERIOD * weight / sum(weights.values()) for name, weight in weights.items()}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[: PERIOD - sum(quotas.values())]:
        quotas[name] += 1
    for name, quota in quotas.items():
        if quota == 0:
            raise ValueError(
                f"sources.{name}.weight is {weights[name]}, {exact[name] / PERIOD:.3%} of the mixture; below "
                f"{1 / PERIOD:.1%} a source would never be drawn"
            )
    return quotas
