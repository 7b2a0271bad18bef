"""Make a corpus: run the generators of a recipe, write shards, and say in a manifest what was written.

The eight domains are those of STEP3-VL's pre-training data (arXiv 2601.09668, section on data). Sample i of a subset is
drawn from its own random stream, so the bytes do not depend on the number of processes.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from step3vl.data.corpus import code, documents, education, flags, grounding, gui, knowledge, text, vqa
from step3vl.data.corpus.assets import digit_images
from step3vl.data.corpus.draft import Draft, Subset
from step3vl.data.corpus.second_order import second_order
from step3vl.data.shards import write_shards
from step3vl.types import IMAGE_MARK, Message, Sample

VERSION = 1
"""Raise it when a generator changes what it draws; a corpus of another version is not reused."""

SEEN_SPLITS = ("train", "seen")
"""Splits drawn from what training may show. All others are held out. Only "train" has several turns a sample."""

DOMAINS: dict[str, dict[str, Subset]] = {
    "knowledge": knowledge.SUBSETS | flags.SUBSETS,
    "education": education.SUBSETS,
    "documents": documents.SUBSETS,
    "code": code.SUBSETS,
    "grounding": grounding.SUBSETS,
    "vqa": vqa.SUBSETS,
    "gui": gui.SUBSETS,
    "text": text.SUBSETS,
}
SLOW = ("code/chart", "documents/formula", "education/equation", "education/calculus")


@dataclass(slots=True)
class Manifest:
    """What a corpus holds. `shards` has one entry a file; `totals` sums them by split and domain."""

    version: int
    seed: int
    recipe: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read `<folder>/manifest.json`. Raises ValueError when it is missing or not a manifest."""
        path = Path(folder) / "manifest.json"
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not the manifest of a corpus ({error})") from error


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard to make: samples first .. first + num - 1 of a subset and level."""

    seed: int
    split: str
    domain: str
    subset: str
    level: int
    number: int
    first: int
    num: int
    turns: int
    wrong_images: bool = False
    second_order: int = 0

    @property
    def cost(self) -> tuple[bool, int, int]:
        return f"{self.domain}/{self.subset}" in SLOW, self.level, self.num


def draft_sample(draft: Draft, name: str, domain: str, subset: str, level: int) -> Sample:
    """A draft as a conversation: image marks open the first question; answer and regions are the last turn's."""
    messages = []
    for k, turn in enumerate(draft.turns):
        marks = IMAGE_MARK * len(draft.images) if k == 0 else ""
        messages.append(Message(role="user", content=marks + turn.question))
        messages.append(Message(role="assistant", content=turn.answer_text))
    last = draft.turns[-1]
    return Sample(
        id=name,
        domain=domain,
        subset=subset,
        level=level,
        messages=messages,
        images=draft.images,
        answer=last.answer_text if last.answer is None else last.answer,
        answer_type=last.answer_type,
        regions=last.regions,
        source=draft.source,
        licence=draft.licence,
    )


def draw_samples(
    seed: int, split: str, domain: str, subset: str, level: int, num: int, turns: int = 1, first: int = 0
) -> Iterator[Sample]:
    """Samples of one subset and level, in order; each depends only on the arguments and its own number.

    Example: next(draw_samples(0, "val", "documents", "digits", 0, 1))
    """
    generate = find_subset(domain, subset, level).generate
    for i in range(first, first + num):
        rng = random.Random(f"{seed}/{split}/{domain}/{subset}/{level}/{i}")
        draft = generate(rng, level, split not in SEEN_SPLITS, turns)
        yield draft_sample(draft, f"{split}-{domain}-{subset}-{level}-{i:06d}", domain, subset, level)


def find_subset(domain: str, subset: str, level: int) -> Subset:
    """The generator of "domain/subset". Raises ValueError, with the nearest names, when it lacks subset or level."""
    name = f"{domain}/{subset}"
    names = [f"{d}/{s}" for d, subsets in DOMAINS.items() for s in subsets]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"the corpus has no subset '{name}'; the nearest are {', '.join(near)}")
    found = DOMAINS[domain][subset]
    if level not in found.levels:
        raise ValueError(f"subset '{name}' has no level {level!r}; it has {', '.join(map(str, found.levels))}")
    return found


# ------------------------------------------------------------------------------------------------ making


def make_corpus(
    out: str | Path,
    recipe: dict[str, Any],
    seed: int | None = None,
    num_processes: int = 2,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Write `<out>/<split>/<domain>-<subset>-level<k>-000000.tar` and `<out>/manifest.json`.

    recipe: {seed, turns, samples_per_shard, splits: {train: {"documents/digits": {0: 6000}}}}; `seed` overrides it.
    With `wrong_images: true` every training sample shows the images of the next one of its shard: a corpus from which
    nothing about images can be learnt, for a control. With `second_order: 4` all images are drawn as contrast,
    in blocks of so many pixels (data/corpus/second_order.py).
    The corpus appears under its name only when whole. One made before from the same recipe and seed is reused.
    Raises ValueError for an unknown key, subset or level, and when `out` holds something else and not `overwrite`.
    """
    out, console = Path(out), console or Console(stderr=True)
    recipe = json.loads(json.dumps(recipe))  # as it will be read back: every key is text
    tasks, seed = _plan(recipe, seed)
    if out.exists() and any(out.iterdir()) and not overwrite:
        manifest = _reuse(out, recipe, seed)
        console.print(f"corpus {out} is there already, {len(manifest.shards)} shards; reused")
        return manifest
    if overwrite and out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise ValueError(f"{out} holds files but no manifest.json, so it is not overwritten; choose another folder")

    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        shards = _run(tasks, part, num_processes, console)
        manifest = Manifest(VERSION, seed, recipe, shards, _totals(shards))
        (part / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        part.chmod(0o755)
        if overwrite and out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _plan(recipe: dict[str, Any], seed: int | None) -> tuple[list[_Task], int]:
    accepted = ("seed", "turns", "samples_per_shard", "splits", "wrong_images", "second_order")
    for name in recipe:
        if name not in accepted:
            raise ValueError(f"corpus recipe: unknown key '{name}'; accepted are {', '.join(accepted)}")
    if not isinstance(recipe.get("splits"), dict) or not recipe["splits"]:
        raise ValueError("corpus recipe: key 'splits' must map split names to subsets, such as train and test")
    chosen = int(recipe.get("seed", 0)) if seed is None else seed
    turns, size = recipe.get("turns", 6), recipe.get("samples_per_shard", 2000)
    for name, value in (("turns", turns), ("samples_per_shard", size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"corpus recipe: key '{name}' must be a whole number from 1, got {value!r}")
    if not isinstance(wrong := recipe.get("wrong_images", False), bool):
        raise ValueError(f"corpus recipe: key 'wrong_images' must be true or false, got {wrong!r}")
    block = recipe.get("second_order", 0)
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        raise ValueError(f"corpus recipe: key 'second_order' must be a number of pixels, or 0 for none, got {block!r}")
    tasks = []
    for split, subsets in recipe["splits"].items():
        for name, levels in subsets.items():
            domain, _, subset = name.partition("/")
            for level, count in levels.items():
                where = f"corpus recipe: splits.{split}.{name}.{level}"
                if not level.isdigit():
                    raise ValueError(f"{where}: a level is one of 0, 1, 2, 3, 4, got {level!r}")
                find_subset(domain, subset, int(level))
                if not isinstance(count, int) or count < 1:
                    raise ValueError(f"{where}: the number of samples must be a whole number from 1, got {count!r}")
                for number, first in enumerate(range(0, count, size)):
                    num, most = min(size, count - first), turns if split == "train" else 1
                    where_from = (chosen, split, domain, subset, int(level), number, first, num, most)
                    tasks.append(_Task(*where_from, wrong_images=wrong and split == "train", second_order=block))
    return tasks, chosen


def _run(tasks: list[_Task], folder: Path, num_processes: int, console: Console) -> list[dict[str, Any]]:
    """Make every shard, dearest first, and return their manifest entries in the order of the tasks."""
    entries: dict[_Task, dict[str, Any]] = {}
    order = sorted(tasks, key=lambda task: task.cost, reverse=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("samples", total=sum(task.num for task in tasks))
        if num_processes <= 1:
            for task in order:
                entries[task] = _make_shard(task, folder)
                progress.advance(bar, task.num)
        else:
            digit_images()  # once, before the processes part
            context = get_context("fork" if sys.platform == "linux" else "spawn")
            with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
                waiting = {pool.submit(_make_shard, task, folder): task for task in order}
                try:
                    for done in as_completed(waiting):
                        entries[waiting[done]] = done.result()
                        progress.advance(bar, waiting[done].num)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [entries[task] for task in tasks]


def _make_shard(task: _Task, folder: Path) -> dict[str, Any]:
    samples = draw_samples(
        task.seed, task.split, task.domain, task.subset, task.level, task.num, task.turns, first=task.first
    )
    if task.wrong_images:
        samples = iter(swap_images(list(samples)))
    if task.second_order:
        samples = (_as_contrast(sample, task.second_order) for sample in samples)
    stem = f"{task.domain}-{task.subset}-level{task.level}"
    (info,) = write_shards(samples, folder / task.split, stem, task.num, first_number=task.number)
    entry = {"split": task.split, "domain": task.domain, "subset": task.subset, "level": task.level}
    return {**asdict(info), **entry, "file": f"{task.split}/{info.file}"}


def _as_contrast(sample: Sample, block: int) -> Sample:
    rng = random.Random(f"second order/{sample.id}")
    return replace(sample, images=[second_order(image, rng, block) for image in sample.images])


def swap_images(samples: list[Sample]) -> list[Sample]:
    """Each sample with the images of the next one that has as many; questions and answers stay where they are."""
    swapped = list(samples)
    for num in {len(sample.images) for sample in samples}:
        places = [k for k, sample in enumerate(samples) if len(sample.images) == num]
        for k, following in zip(places, [*places[1:], places[0]]):
            swapped[k] = replace(samples[k], images=samples[following].images)
    return swapped


def _totals(shards: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    totals: dict[str, dict[str, dict[str, int]]] = {}
    names = ("num_samples", "num_turns", "num_images", "num_text_bytes", "size_bytes")
    for shard in shards:
        sums = totals.setdefault(shard["split"], {}).setdefault(shard["domain"], dict.fromkeys(names, 0))
        for name in names:
            sums[name] += shard[name]
    return totals


def _reuse(out: Path, recipe: dict[str, Any], seed: int) -> Manifest:
    """The manifest of a corpus made before, if it is the one asked for and all there."""
    advice = "choose another folder or pass overwrite"
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out} holds files but no manifest.json, so it is not a corpus; {advice}")
    found = Manifest.load(out)
    for name, ours, theirs in (
        ("version", VERSION, found.version),
        ("seed", seed, found.seed),
        ("recipe", recipe, found.recipe),
    ):
        if ours != theirs:
            detail = "" if name == "recipe" else f" ({theirs}, asked for {ours})"
            raise ValueError(f"{out} holds a corpus of another {name}{detail}; {advice}")
    for shard in found.shards:
        path = out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["size_bytes"]:
            raise ValueError(f"{path} is missing or has changed since the corpus was made; {advice}")
    return found
