"""Shared by the tests of shards: samples, and tars made member by member."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
from PIL import Image

from step3vl.types import Message, Sample


def make(number: int, num_images: int = 1) -> Sample:
    pixels = np.random.default_rng(number).integers(0, 255, (2, 8, 9, 3), dtype=np.uint8)
    return Sample(
        id=f"s/{number:03d}",
        domain="vqa",
        subset="test",
        level=1,
        messages=[
            Message(role="user", content="<image>" * num_images + f"Question {number}?"),
            Message(role="assistant", content=f"é{number}"),
        ],
        images=[Image.fromarray(pixels[k]) for k in range(num_images)],
        answer=f"é{number}",
        answer_type="exact",
    )


def raw(path, members: dict[str, bytes]):
    """A tar with these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def row(images: list[str], **changes) -> bytes:
    base = {"id": "x", "domain": "d", "subset": "s", "level": 0, "source": "s", "licence": "l"}
    base["messages"] = [{"role": "user", "content": "<image>" * len(images)}, {"role": "assistant", "content": "a"}]
    return json.dumps({**base, "images": images, **changes}).encode()


def png(width: int = 4, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()
