"""Images with captions, for contrastive pre-training of encoders: a sample's turns become one text about its image.

An image is its global view alone. Captions say what is in the image: "Read row 1. 746 Read row 2. 11 ...", with turns
in alphabetical order, so that equal content is an equal caption whatever order it was asked in.

Shapes: n pairs, T tokens of the longest caption, C colour channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Dataset

from step3vl.data.images import views
from step3vl.data.mixture import Draw, Mixture
from step3vl.data.plan import Step
from step3vl.data.processor import Processor
from step3vl.types import IMAGE_MARK, ImageSpec, Sample


@dataclass(slots=True, kw_only=True)
class Pairs:
    """Images and their captions, in equal order."""

    pixels: Tensor  # [n,C,H,W] uint8
    ids: Tensor  # [n,T] long
    mask: Tensor  # [n,T] bool, True at a caption's tokens, which come first
    captions: Tensor  # [n] long: equal captions have equal numbers
    sample_ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # for each pair: the mixture's source it was drawn from
    num_held_out: int = 0  # samples drawn that are kept for measuring, or were not
    num_cut: int = 0  # captions that were longer than max_tokens and lost their end
    skipped: list[str] = field(default_factory=list)  # "id: reason" of samples that could not be used

    @property
    def num_images(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pairs:
        """Lightning moves anything that has this method."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in values.items()}
        return Pairs(**moved)


def caption(sample: Sample) -> str:
    """What a sample says about its image: each question with its answer, in alphabetical order.

    Raises ValueError with the sample's id when it has not exactly one image, or no answer.
    """
    if len(sample.images) != 1:
        raise ValueError(f"sample {sample.id!r} has {len(sample.images)} images; a pair is one image and its caption")
    turns: list[str] = []
    question = ""
    for message in sample.messages:
        if message.role == "assistant":
            turns.append(f"{question} {message.content}".strip())
            question = ""
        else:
            question = f"{question} {message.content.replace(IMAGE_MARK, '')}".strip()
    if not turns:
        raise ValueError(f"sample {sample.id!r} has no assistant turn, so there is nothing to say about its image")
    return " ".join(sorted(turns))


class PairBatches(Dataset[Pairs]):
    """`batches[step]` are the pairs of a planned step; samples that cannot be used are named in `Pairs.skipped`.

    Args:
        mixture: where samples come from.
        processor: makes tokens of captions.
        spec: what the encoder needs from pixels.
        max_tokens: longer captions lose their end.
        held_out_every: one of so many samples, by its key in the shard, is held out; 0: none.
        is_held_out: make pairs of the held-out samples alone, in place of the others.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        spec: ImageSpec,
        max_tokens: int,
        held_out_every: int = 0,
        is_held_out: bool = False,
    ):
        self.mixture, self.processor, self.spec, self.max_tokens = mixture, processor, spec, max_tokens
        self.held_out_every, self.is_held_out = held_out_every, is_held_out

    def __getitem__(self, step: Step) -> Pairs:
        skipped = list(step.skipped)
        found: list[tuple[Draw, Sample, str]] = []
        num_held_out = 0
        for row in step.rows:
            for draw in row:
                shard, index = self.mixture.place(draw)
                is_kept_back = held_out(f"{draw[0]}/{shard.key(index)}", self.held_out_every)
                num_held_out += is_kept_back
                if is_kept_back != self.is_held_out:
                    continue
                try:
                    sample = shard.read(index)
                    found.append((draw, sample, caption(sample)))
                except (ValueError, OSError) as error:
                    skipped.append(f"{draw[0]}/{shard.key(index)}: {error}")
        pairs = self.collate(found, skipped)
        pairs.num_held_out = num_held_out
        return pairs

    def collate(self, found: Sequence[tuple[Draw, Sample, str]], skipped: Sequence[str] = ()) -> Pairs:
        """Pairs of samples and their captions."""
        texts = [self.processor.tokenizer.text(text) for _, _, text in found]
        cut = [ids[: self.max_tokens] or [self.processor.pad_id] for ids in texts]
        longest = max((len(ids) for ids in cut), default=1)
        ids = torch.full((len(cut), longest), self.processor.pad_id, dtype=torch.long)  # [n,T]
        mask = torch.zeros(len(cut), longest, dtype=torch.bool)  # [n,T]
        for k, row in enumerate(cut):
            ids[k, : len(row)] = torch.tensor(row)
            mask[k, : len(row)] = True
        side = self.spec.layout.global_pixels
        pixels = [views(sample.images[0], self.spec)[-1] for _, sample, _ in found]
        return Pairs(
            pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side, dtype=torch.uint8),
            ids=ids,
            mask=mask,
            captions=torch.tensor([number_of(row) for row in cut], dtype=torch.long),
            sample_ids=[sample.id for _, sample, _ in found],
            sources=[draw[0] for draw, _, _ in found],
            num_cut=sum(len(ids) > self.max_tokens for ids in texts),
            skipped=list(skipped),
        )


def held_out(key: str, every: int) -> bool:
    """Whether a sample is kept for measuring: one of `every`, the same ones in every run; 0: none."""
    return every > 0 and crc32(key.encode()) % every == 0


def number_of(ids: Sequence[int]) -> int:
    """A number below 2^63 for a caption's tokens, the same in every process."""
    data = b"".join(token.to_bytes(4, "big") for token in ids)
    return (crc32(data) << 31) ^ crc32(data[::-1])
