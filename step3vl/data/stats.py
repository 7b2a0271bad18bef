"""What a folder of shards holds, as tables: counts, lengths, image sizes, answers and how far guessing would get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from step3vl.data.shards import SampleError, ShardReader, find_shards
from step3vl.types import Sample

Key = tuple[str, str, str, int]
SIDES = (64, 128, 256, 512, 728, 1024)


@dataclass(slots=True)
class Counts:
    """Sums over the samples of one split, domain, subset and level."""

    num_samples: int = 0
    num_images: int = 0
    num_turns: int = 0
    num_text_bytes: int = 0
    num_text_tokens: int = 0
    num_image_tokens: int = 0
    sides: Counter[int] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    answer_types: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample, tokens: tuple[int, int]) -> None:
        self.num_samples += 1
        self.num_images += len(sample.images)
        self.num_turns += sum(message.role == "assistant" for message in sample.messages)
        self.num_text_bytes += sum(len(message.content.encode()) for message in sample.messages)
        self.num_text_tokens += tokens[0]
        self.num_image_tokens += tokens[1]
        for image in sample.images:
            self.sides[next((k for k, side in enumerate(SIDES) if max(image.size) <= side), len(SIDES))] += 1
        self.answer_types[sample.answer_type or "none"] += 1
        if sample.answer is not None:
            self.answers[sample.answer] += 1


def count_shards(
    shards: list[Path], count_tokens: Callable[[Sample], tuple[int, int]] | None = None
) -> tuple[dict[Key, Counts], list[str]]:
    """Counts by (split, domain, subset, level), and one sentence for each thing that could not be read.

    The split is the name of the shard's folder. count_tokens returns (text tokens, image tokens) of a sample.
    """
    counts: dict[Key, Counts] = {}
    damage: list[str] = []
    for path in shards:
        reader = ShardReader(path, strict=False)
        damage += [reader.index.damage] if reader.index.damage else []
        damage += [f"{path}:{key}: {reason}" for key, reason in reader.index.broken.items()]
        for i in range(len(reader)):
            try:
                sample = reader.read(i)
            except SampleError as error:
                damage.append(str(error))
                continue
            key = (path.parent.name, sample.domain, sample.subset, sample.level)
            counts.setdefault(key, Counts()).add(sample, count_tokens(sample) if count_tokens else (0, 0))
    return dict(sorted(counts.items())), damage


def print_stats(
    folder_or_glob: str | Path, console: Console, count_tokens: Callable[[Sample], tuple[int, int]] | None = None
) -> None:
    """Print tables of contents, image sizes and answers for a folder (with its subfolders) or a glob of shards.

    "majority" is the share of the commonest answer: what a model scores that never looks. Raises ValueError when no
    shard is found; damaged shards and samples are listed, not hidden.
    """
    folder = Path(folder_or_glob)
    shards = find_shards(folder / "**" / "*.tar" if folder.is_dir() else folder_or_glob)
    counts, damage = count_shards(shards, count_tokens)
    console.print(_contents(counts, count_tokens is not None))
    console.print(_sizes(counts))
    console.print(_answers(counts))
    for sentence in damage:
        console.print(f"damaged: {sentence}", style="red", markup=False)
    console.print(f"{len(shards)} shards, {len(damage)} damaged shards or samples")


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title)
    for k, name in enumerate(columns):
        table.add_column(name, justify="left" if k < 3 else "right", no_wrap=k < 3)
    return table


def _contents(counts: dict[Key, Counts], tokens: bool) -> Table:
    names = ["split", "domain", "subset", "level", "samples", "images", "turns", "bytes/sample"]
    table = _table("contents", names + (["text tokens", "image tokens"] if tokens else []))
    for key, row in [*counts.items(), (("all", "", "", ""), _total(list(counts.values())))]:
        cells = [*map(str, key), *(f"{n:,}" for n in (row.num_samples, row.num_images, row.num_turns))]
        cells.append(f"{row.num_text_bytes / max(1, row.num_samples):.1f}")
        table.add_row(*cells, *([f"{row.num_text_tokens:,}", f"{row.num_image_tokens:,}"] if tokens else []))
    return table


def _sizes(counts: dict[Key, Counts]) -> Table:
    sides = [f"<= {side}" for side in SIDES] + [f"> {SIDES[-1]}"]
    table = _table("images by longer side (pixels)", ["split", "domain", "", *sides])
    groups: dict[tuple[str, str], list[Counts]] = {}
    for (split, domain, _, _), row in counts.items():
        groups.setdefault((split, domain), []).append(row)
    for (split, domain), rows in groups.items():
        total = _total(rows)
        table.add_row(split, domain, "", *(f"{total.sides[k]:,}" if total.sides[k] else "" for k in range(len(sides))))
    return table


def _answers(counts: dict[Key, Counts]) -> Table:
    table = _table("answers", ["split", "domain", "subset", "level", "types", "different", "commonest", "majority"])
    for key, row in counts.items():
        types = ", ".join(f"{name} {n}" for name, n in row.answer_types.most_common())
        answer, n = row.answers.most_common(1)[0] if row.answers else ("", 0)
        first = answer.split("\n")[0]
        short = first if len(first) <= 24 else first[:21] + "..."
        share = f"{n / row.num_samples:.1%}"
        table.add_row(*map(str, key), types, f"{len(row.answers):,}", short.replace("[", r"\["), share)
    return table


def _total(rows: list[Counts]) -> Counts:
    total = Counts()
    for row in rows:
        total.num_samples += row.num_samples
        total.num_images += row.num_images
        total.num_turns += row.num_turns
        total.num_text_bytes += row.num_text_bytes
        total.num_text_tokens += row.num_text_tokens
        total.num_image_tokens += row.num_image_tokens
        total.sides += row.sides
    return total
