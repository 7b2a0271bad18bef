"""What a step of a run consists of: samples, tokens, views, FLOPs; from measured shards, or from typical samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from step3vl.config import ConfigError, nearest
from step3vl.data.images import plan as crop_plan
from step3vl.data.processor import Processor
from step3vl.data.shards import find_shards
from step3vl.data.sizes import cache_file
from step3vl.models import VisionLanguageModel
from step3vl.types import Size

SAMPLED = 500
"""Samples of a source whose FLOPs are counted one by one."""
TEXT_TOKENS = {"samples": 256, "rows": 2048}
"""Text tokens of a typical sample, for runs whose step is counted in samples and in rows."""
IMAGE_SIZES = {"image": (1.4, 1.05), "page": (2.0, 2.75)}
"""Width and height of the image of each kind of sample, in sides of the global view: 1,019 x 764 px and a scanned page
of 1,456 x 2,002 px for STEP3-VL."""
KINDS = ("text", *IMAGE_SIZES)


@dataclass(frozen=True)
class Mean:
    """A mean sample."""

    num_tokens: float
    num_labels: float
    num_crops: float
    num_global_views: float
    flops: float
    """Of forward and backward."""


@dataclass(frozen=True)
class Workload:
    """One optimizer step over all ranks, and one micro-batch of one rank."""

    sample: Mean
    samples_per_step: float
    tokens_per_step: float
    slots_per_micro_batch: float
    """Tokens of a rank's packed rows, padding included."""
    samples_per_micro_batch: float
    units_per_micro_batch: int
    """Samples or rows, as the data count them."""
    is_counted_in_rows: bool
    max_views: float | None
    """Most views of a micro-batch that the data allow; None: no limit."""
    assumed: tuple[str, ...]

    @property
    def flops_per_step(self) -> float:
        return self.samples_per_step * self.sample.flops

    @property
    def views_per_step(self) -> float:
        return self.samples_per_step * (self.sample.num_crops + self.sample.num_global_views)


def workload(config: Mapping[str, Any], num_ranks: int, sample: Mean, assumed: tuple[str, ...]) -> Workload:
    """A step of the composed run on so many ranks that see different data."""
    data = config["data"]["init_args"]
    times = int(config["trainer"].get("accumulate_grad_batches") or 1) * num_ranks
    seq_len = int(data["seq_len"])
    if data.get("samples_per_step"):
        units = int(data["samples_per_step"])
        samples = float(units)
        slots = float(math.ceil(samples * sample.num_tokens / seq_len) * seq_len)
        tokens = samples * sample.num_tokens
        max_views = None
    else:
        units = int(data["rows_per_step"])
        slots = tokens = float(units) * seq_len
        samples = tokens / sample.num_tokens
        max_views = data.get("max_views_per_row") and float(data["max_views_per_row"] * units)
        assumed = (*assumed, "rows are full")
    in_rows = not data.get("samples_per_step")
    return Workload(sample, samples * times, tokens * times, slots, samples, units, in_rows, max_views, assumed)


# ------------------------------------------------------------------------------------------------ from shards


def measured_mean(
    data: Mapping[str, Any], processor: Processor, vlm: VisionLanguageModel
) -> tuple[Mean, tuple[str, ...]] | str:
    """The mean sample of data.sources by their weights, when all their shards were measured; else why not."""
    flops, means, missing = vlm.flops(), {}, 0
    for name, source in data["sources"].items():
        try:
            paths = find_shards(str(Path(data["root"]) / source["shards"]))
        except ValueError as error:
            return str(error)
        files = [cache_file(path, processor.fingerprint) for path in paths]
        found = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files if file.exists()]
        missing += len(files) - len(found)
        if missing or not found:
            continue
        sizes = np.concatenate(found)
        sizes = sizes[(sizes["num_tokens"] > 0) & (sizes["num_tokens"] <= data["seq_len"])]
        if not len(sizes):
            return f"no sample of the source {name} fits into data.seq_len {data['seq_len']}"
        chosen = sizes[np.linspace(0, len(sizes) - 1, min(SAMPLED, len(sizes))).astype(int)]
        cost = float(np.mean([flops.sample(Size(*size.item())) for size in chosen]))
        means[name] = _mean([float(sizes[key].mean()) for key in Size._fields], cost)
    if missing:
        return f"{missing} shards under {data['root']} are not measured yet"
    weights = {name: float(source["weight"]) for name, source in data["sources"].items()}
    unit = data.get("mix_by") or "samples"
    return _mix(means, weights, unit), (f"samples as measured in {data['root']}, mixed by the weights of data.sources",)


# ------------------------------------------------------------------------------------------------ typical samples


def typical_mean(
    data: Mapping[str, Any],
    vlm: VisionLanguageModel,
    mix: Mapping[str, float] | None = None,
    images: float | None = None,
    text_tokens: int | None = None,
) -> tuple[Mean, tuple[str, ...]]:
    """A mean sample from typical ones, and in words what they are.

    Args:
        mix: share of each kind (text, image, page), in samples or tokens as `data.mix_by` says.
        images: share of samples with one image, in place of `mix`; without both, sources whose name begins with text
            are text, and the others have an image.
        text_tokens: text of a sample; None: a default that the words name.
    """
    unit = data.get("mix_by") or "samples"
    if mix is not None:
        shares, how = dict(mix), f"shares of {unit} as given"
    elif images is not None:
        if not 0 <= images <= 1:
            raise ConfigError(f"--images is a share of samples between 0 and 1, got {images}")
        shares, how, unit = {"text": 1 - images, "image": images}, f"{images:.0%} of samples have an image", "samples"
    else:
        weights = {name: float(source["weight"]) for name, source in data["sources"].items()}
        text = sum(weight for name, weight in weights.items() if name.startswith("text")) / sum(weights.values())
        shares = {"text": text, "image": 1 - text}
        how = f"{1 - text:.0%} of {unit} come with an image, as the names and weights of data.sources say"
    for kind, share in shares.items():
        if kind not in KINDS:
            raise ConfigError(f"--mix: no kind of sample {kind!r}; {nearest(kind, KINDS)}")
        if share < 0:
            raise ConfigError(f"--mix: the share of {kind} is {share}, but must not be below 0")
    shares = {kind: share for kind, share in shares.items() if share > 0}
    if not shares:
        raise ConfigError("--mix: all shares are 0")
    text_tokens = text_tokens or TEXT_TOKENS["samples" if data.get("samples_per_step") else "rows"]
    sizes = {kind: typical_size(kind, vlm, text_tokens) for kind in shares}
    flops = vlm.flops()
    means = {kind: _mean(size, flops.sample(size)) for kind, size in sizes.items()}
    words = [how, f"a sample has {text_tokens:,} text tokens, half of them learnt"]
    for kind, size in sizes.items():
        if kind in IMAGE_SIZES:
            width, height = image_size(kind, vlm)
            words.append(
                f"its {kind} has {width:,} x {height:,} px: {size.num_crops} crops, {size.num_global_views} global "
                f"view, {size.num_tokens - text_tokens:,} tokens"
            )
    return _mix(means, shares, unit), tuple(words)


def image_size(kind: str, vlm: VisionLanguageModel) -> tuple[int, int]:
    """Width and height in pixels of a typical image."""
    side = vlm.image_spec.layout.global_size
    return int(side * IMAGE_SIZES[kind][0]), int(side * IMAGE_SIZES[kind][1])


def typical_size(kind: str, vlm: VisionLanguageModel, text_tokens: int) -> Size:
    """A text, or text with one image; a view has a token before and after it, and a row of crops one after it."""
    if kind == "text":
        return Size(text_tokens, text_tokens // 2, 0, 0)
    layout = vlm.image_spec.layout
    crops = crop_plan(*image_size(kind, vlm), layout)
    visual = crops.num_crops * vlm.num_visual_tokens(layout.crop_pixels) + vlm.num_visual_tokens(layout.global_pixels)
    marks = 2 * (crops.num_crops + 1) + crops.num_newlines
    return Size(text_tokens + visual + marks, text_tokens // 2, crops.num_crops, 1)


def _mean(size: Sequence[float], flops: float) -> Mean:
    num_tokens, num_labels, num_crops, num_global_views = (float(value) for value in size)
    return Mean(num_tokens, num_labels, num_crops, num_global_views, flops)


def _mix(means: Mapping[str, Mean], weights: Mapping[str, float], unit: str) -> Mean:
    """The mean over samples; weights are shares of samples or of tokens."""
    per_sample = {name: weights[name] / (mean.num_tokens if unit == "tokens" else 1) for name, mean in means.items()}
    total = sum(per_sample.values())
    fields = Mean.__dataclass_fields__
    return Mean(*(sum(per_sample[n] / total * getattr(mean, field) for n, mean in means.items()) for field in fields))
