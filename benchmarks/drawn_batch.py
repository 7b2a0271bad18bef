"""Batches of drawn words and noise images, of a wanted size, made by the real pipeline: sample, processor, collate."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

from step3vl.data import Processor
from step3vl.data.collate import collate
from step3vl.data.images import plan
from step3vl.types import IMAGE_MARK, Batch, Example, Message, MultiCrop, Sample

WORDS = "the of and to in is that for it as with on be at by this have from or one had not but what all were when we"
MIN_TEXT = 32  # tokens of a row that its text document must have, markup included


def image_size(num_crops: int, layout: MultiCrop) -> tuple[int, int]:
    """(width, height) of an image that is cut into so many crops, as square as can be. ValueError if none is."""

    def find(count: int) -> tuple[int, int] | None:
        for rows in range(math.isqrt(count), 0, -1):
            size = count // rows * layout.crop_size, rows * layout.crop_size
            if count % rows == 0 and plan(*size, layout).num_crops == count:
                return size
        return (layout.global_size, layout.global_size) if count == 0 else None

    found = find(num_crops)
    if found is None:
        possible = ", ".join(str(count) for count in range(37) if find(count))
        raise ValueError(f"--crops {num_crops}: no image is cut so; possible here: {possible}")
    return found


def draw_text(processor: Processor, num_tokens: int, rng: random.Random) -> str:
    """Words without meaning of exactly so many tokens; digits, which are one token each, fill up the end."""
    pieces, left = [], num_tokens
    while left > 8:
        pieces.append(" " + rng.choice(WORDS.split()))
        left -= len(processor.tokenizer.text(pieces[-1]))
    return "".join(pieces) + "".join(rng.choice("0123456789") for _ in range(left))


def draw_batch(processor: Processor, seq_len: int, num_rows: int, num_images: int, num_crops: int) -> Batch:
    """Rows of `seq_len` tokens, full to the last one: samples with one image each, then a text document.

    An image sample has `num_crops` crops, a global view and a text of an eighth of the row. The processor must be
    bound. Raises ValueError when the images leave no room for text.
    """
    rng, numbers = random.Random(0), np.random.default_rng(0)
    assert processor.spec is not None
    size = image_size(num_crops, processor.spec.layout)

    def example(id: str, has_image: bool, num_tokens: int) -> Example:
        """`num_tokens`: with an image those of the text, else those of all, markup included."""
        pixels = numbers.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)  # [H,W,3]
        images = [Image.fromarray(pixels)] if has_image else []
        question = Message(role="user", content=IMAGE_MARK * len(images) + "Go on.")
        answer = Message(role="assistant", content="")
        if not has_image:
            num_tokens -= processor.measure([question, answer], [], id).num_tokens
        answer.content = draw_text(processor, num_tokens, rng)
        return processor.encode(
            Sample(id=id, domain="text", subset="drawn", level=0, messages=[question, answer], images=images)
        )

    examples: list[Example] = []
    for row in range(num_rows):
        drawn = [example(f"image-{row}-{k}", True, seq_len // 8) for k in range(num_images)]
        left = seq_len - sum(len(one.input_ids) for one in drawn)
        if left < MIN_TEXT:
            raise ValueError(
                f"{num_images} images of {num_crops} crops take {seq_len - left} of {seq_len} tokens; "
                "give a larger --seq_len, or fewer --images or --crops"
            )
        examples += [*drawn, example(f"text-{row}", False, left)]
    return collate(examples, seq_len, pad_id=processor.pad_id)
