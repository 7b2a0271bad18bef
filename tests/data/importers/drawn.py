"""Small sources to import: pictures on disk and records in every dialect."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from step3vl.data.importers.build import Labels

LABELS = Labels(domain="vqa", subset="mine", source="me", licence="CC0-1.0")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


def encoded(format: str = "PNG", number: int = 0, **options) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (24 + number, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def pictures(folder: Path, num: int = 3) -> Path:
    """`<folder>/coco/0.jpg`, `0.png`, ... in each format."""
    (folder / "coco").mkdir(parents=True)
    for number in range(num):
        for format, extension in EXTENSIONS.items():
            (folder / "coco" / f"{number}.{extension}").write_bytes(encoded(format, number))
    return folder


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def llava(number: int = 0, **changes) -> dict:
    base = {
        "id": f"r{number}",
        "image": f"coco/{number % 3}.jpg",
        "conversations": turns("<image>\nWhat?", f"A{number}."),
    }
    return {name: value for name, value in (base | changes).items() if value is not ...}


def write_json(path: Path, records: list, indent: int | None = None) -> Path:
    path.write_text(json.dumps(records, indent=indent), encoding="utf-8")
    return path


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
