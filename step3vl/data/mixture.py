"""A mixture of sources as one endless list of samples: the order follows from the seed alone.

Ranks and workers take slices of that list, so the order does not depend on how many there are. Weights are shares of
samples, exact (to 1/1000) in every aligned stretch of 1,000 samples, or shares of tokens, where the source that is
furthest behind its share is drawn next.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import numpy as np

from step3vl.data.shards import ShardError, ShardReader, find_shards, index_shard
from step3vl.data.shuffle import mix, shuffled
from step3vl.types import Size

if TYPE_CHECKING:
    from rich.table import Table

    from step3vl.data.processor import Processor

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
    max_epochs: float | None = None
    """A run that would show these samples more often is refused before its first step; None: no limit."""


Unit = Literal["samples", "tokens"]
Draw = tuple[str, int]
"""Source, and how many samples of it were drawn before: names one sample of an endless run."""


class Mixture:
    """Weighted sources under `root`, in an order that `seed` fixes.

    Args:
        root: folder that holds the shards.
        sources: what is mixed, by name.
        seed: order of the samples.
        unit: what the weights are shares of. For tokens, `measure` must come before the first draw.

    Damaged shards contribute what is whole; `warnings` has a sentence for each. Raises ValueError for no sources, a
    weight that is not above 0 or too small ever to be drawn, a pattern without shards, or a source without samples.
    """

    def __init__(self, root: str | Path, sources: Mapping[str, Source], seed: int = 0, unit: Unit = "samples"):
        if unit not in ("samples", "tokens"):
            raise ValueError(f"mix_by must be samples or tokens, got {unit!r}")
        if not sources:
            raise ValueError("sources: a mixture needs at least one source, got none")
        self.root, self.seed, self.unit = Path(root), seed, unit
        self.sources = dict(sources)
        self.warnings: list[str] = []
        self.quotas = _quotas({name: source.weight for name, source in self.sources.items()}, unit)
        self._shards: dict[str, list[Path]] = {}
        self._ends: dict[str, list[int]] = {}  # running number of samples after each shard
        for name, source in self.sources.items():
            self._shards[name], counts = self._survey(name, source)
            self._ends[name] = list(accumulate(counts))
        self._sizes: dict[str, np.ndarray] = {}
        self.seq_len = 0
        self._periods: OrderedDict[int, list[tuple[str, int]]] = OrderedDict()
        self._readers: OrderedDict[Path, ShardReader] = OrderedDict()

    def num_samples(self, name: str) -> int:
        """Usable samples of a source."""
        if name not in self._ends:
            raise ValueError(f"no source {name!r} in this mixture; it has {', '.join(self.sources)}")
        return self._ends[name][-1]

    @property
    def shards(self) -> list[Path]:
        """All shards, in the order of the sources."""
        return [path for paths in self._shards.values() for path in paths]

    @property
    def is_measured(self) -> bool:
        return bool(self._sizes)

    def shares(self) -> dict[str, float]:
        """What each source's share of the unit should be."""
        total = sum(source.weight for source in self.sources.values())
        return {name: source.weight / total for name, source in self.sources.items()}

    def measure(self, processor: Processor, seq_len: int) -> None:
        """Learn what every sample costs (`step3vl.data.sizes`); longer ones than `seq_len` cannot be used.

        Raises ValueError for a source of which nothing can be used.
        """
        from step3vl.data.sizes import shard_sizes

        for name, paths in self._shards.items():
            sizes = np.concatenate([shard_sizes(path, processor) for path in paths])
            if len(sizes) != self.num_samples(name):
                raise ValueError(f"sources.{name}: {self.num_samples(name)} samples, but sizes of {len(sizes)}")
            num_tokens = sizes["num_tokens"]
            if not ((num_tokens > 0) & (num_tokens <= seq_len)).any():
                shortest = (
                    f"the shortest has {num_tokens[num_tokens > 0].min()} tokens" if (num_tokens > 0).any() else ""
                )
                raise ValueError(
                    f"sources.{name}: none of its {len(sizes)} samples can be used with seq_len {seq_len}; "
                    + (shortest or "none of them can be encoded")
                )
            self._sizes[name] = sizes
        self.seq_len = seq_len

    def place(self, draw: Draw) -> tuple[ShardReader, int]:
        """Shard and index in the shard of a drawn sample."""
        name, place = draw[0], self._place(draw)
        shard = bisect_right(self._ends[name], place)
        first = self._ends[name][shard - 1] if shard else 0
        return self._reader(self._shards[name][shard]), place - first

    def size(self, draw: Draw) -> Size:
        """What a drawn sample costs; num_tokens is -1 when it cannot be encoded. `measure` must have come before."""
        return Size(*self._sizes[draw[0]][self._place(draw)].item())

    def sample_draw(self, j: int) -> Draw:
        """What is drawn at position j >= 0 when weights are shares of samples."""
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

    def expected(self, total: float) -> dict[str, tuple[float, float]]:
        """(what is drawn of each source, epochs) in a run over `total` samples or tokens."""
        found = {}
        for name, share in self.shares().items():
            share = share if self.unit == "tokens" else self.quotas[name] / PERIOD
            have = self.num_samples(name) if self.unit == "samples" else self.num_tokens(name)
            found[name] = (total * share, total * share / have)
        return found

    def num_tokens(self, name: str) -> int:
        """Tokens of a source's usable samples; `measure` must have come before."""
        sizes = self._sizes[name]["num_tokens"]
        return int(sizes[(sizes > 0) & (sizes <= self.seq_len)].sum())

    def check_repeats(self, total: float) -> None:
        """Raises ValueError when a run over `total` samples or tokens would show a source more often than it may."""
        for name, (_, epochs) in self.expected(total).items():
            limit = self.sources[name].max_epochs
            if limit is not None and epochs > limit:
                raise ValueError(
                    f"sources.{name}: this run would show its samples {epochs:.2f} times and max_epochs is {limit:g}; "
                    "lower its weight or the number of steps, add data, or raise max_epochs"
                )

    def table(self, total: float) -> Table:
        """What a run over `total` samples or tokens will see, for printing before it starts."""
        from rich.table import Table

        title = f"Mixture: {total:,.0f} {self.unit}, seed {self.seed}"
        table = Table(title=title, title_justify="left")
        has_limits = any(source.max_epochs is not None for source in self.sources.values())
        tokens, limits = ["tokens"] * self.is_measured, ["limit"] * has_limits
        columns = ["source", "shards", "samples", *tokens, "share", "drawn", "epochs", *limits]
        for column in columns:
            table.add_column(column, justify="left" if column == "source" else "right")
        for name, (drawn, epochs) in self.expected(total).items():
            limit = self.sources[name].max_epochs
            cells = [f"{len(self._shards[name])}", f"{self.num_samples(name):,}"]
            cells += [f"{self.num_tokens(name):,}"] if self.is_measured else []
            cells += [f"{drawn / total:.1%}", f"{drawn:,.0f}", f"{epochs:.2f}"]
            cells += ["" if limit is None else f"{limit:g}"] if has_limits else []
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

    def _place(self, draw: Draw) -> int:
        """Number of a drawn sample in its source."""
        name, number = draw
        n = self.num_samples(name)
        epoch, i = divmod(number, n)
        return shuffled(i, n, mix(self.seed, crc32(name.encode()), epoch))

    def _reader(self, path: Path) -> ShardReader:
        if path not in self._readers:
            self._readers[path] = ShardReader(path, strict=False)
            if len(self._readers) > MAX_READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(path)
        return self._readers[path]


def _quotas(weights: dict[str, float], unit: Unit) -> dict[str, int]:
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
        if quota == 0 and unit == "samples":
            raise ValueError(
                f"sources.{name}.weight is {weights[name]}, {exact[name] / PERIOD:.3%} of the mixture; below "
                f"{1 / PERIOD:.1%} a source would never be drawn"
            )
    return quotas
