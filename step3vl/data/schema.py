"""The stored form of a sample: one JSON object and its images. `from_json` checks a row before anything uses it.

The fields are those of `step3vl.types.Sample`; docs/data_format.md describes them for people who bring their own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from step3vl.types import IMAGE_MARK, Message, Region, Sample

ROLES = ("system", "user", "assistant")
ANSWER_TYPES = ("exact", "letter", "contains", "number", "math", "point", "box")
LEVELS = (0, 1, 2, 3, 4)
REQUIRED = ("id", "domain", "subset", "level", "messages", "source", "licence")
OPTIONAL = ("images", "answer", "answer_type", "regions")


def image_member(number: int, image: Image.Image) -> str:
    """Name of image `number` after the sample's key: "0.png", or "0.jpg" for one that came out of a JPEG file."""
    return f"{number}.{'jpg' if image.format == 'JPEG' else 'png'}"


def to_json(sample: Sample) -> dict[str, Any]:
    """The row to store. Images are named by the member that holds them: ["0.png", "1.png"]."""
    row: dict[str, Any] = {
        "id": sample.id,
        "domain": sample.domain,
        "subset": sample.subset,
        "level": sample.level,
        "messages": [{"role": message.role, "content": message.content} for message in sample.messages],
        "images": [image_member(k, image) for k, image in enumerate(sample.images)],
        "answer": sample.answer,
        "answer_type": sample.answer_type,
        "regions": [{"label": r.label, "box": list(r.box), "image": r.image} for r in sample.regions],
        "source": sample.source,
        "licence": sample.licence,
    }
    return row


def from_json(row: Any, images: Sequence[Image.Image], where: str) -> Sample:
    """Check a stored row and make it a Sample. `where` names shard and key in errors.

    Raises ValueError with one sentence that names `where`, the field, what was found and what is accepted.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the JSON must be an object, found {type(row).__name__}")
    for name in REQUIRED:
        if name not in row:
            raise ValueError(f"{where}: field '{name}' is missing; required are {', '.join(REQUIRED)}")
    unknown = sorted(str(name) for name in set(row) - set(REQUIRED) - set(OPTIONAL))
    if unknown:
        raise ValueError(f"{where}: unknown field '{unknown[0]}'; fields are {', '.join(REQUIRED + OPTIONAL)}")
    for name in ("id", "domain", "subset", "source", "licence"):
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{where}: field '{name}' must be text that is not empty, found {row[name]!r}")
    level = row["level"]
    if type(level) is not int or level not in LEVELS:
        raise ValueError(f"{where}: field 'level' must be one of 0, 1, 2, 3, 4, found {level!r}")

    messages = _messages(row["messages"], where)
    num_marks = sum(message.content.count(IMAGE_MARK) for message in messages)
    if num_marks != len(images):
        raise ValueError(f"{where}: field 'messages' has {num_marks} {IMAGE_MARK} marks for {len(images)} images")
    regions = _regions(row.get("regions") or [], len(images), where)
    answer, answer_type = row.get("answer"), row.get("answer_type")
    if answer is not None and not isinstance(answer, str):
        raise ValueError(f"{where}: field 'answer' must be text or null, found {answer!r}")
    if answer_type is not None and answer_type not in ANSWER_TYPES:
        raise ValueError(f"{where}: field 'answer_type' is {answer_type!r}; accepted are {', '.join(ANSWER_TYPES)}")
    if (answer is None) != (answer_type is None):
        raise ValueError(f"{where}: fields 'answer' and 'answer_type' must be given together or both be null")
    if answer_type in ("point", "box") and not any(region.label == "answer" for region in regions):
        raise ValueError(
            f"{where}: field 'regions' has no region labelled 'answer', which a {answer_type} answer needs"
        )
    return Sample(
        id=row["id"],
        domain=row["domain"],
        subset=row["subset"],
        level=level,
        messages=messages,
        images=list(images),
        answer=answer,
        answer_type=answer_type,
        regions=regions,
        source=row["source"],
        licence=row["licence"],
    )


def _messages(rows: Any, where: str) -> list[Message]:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{where}: field 'messages' must be a list of at least one message, found {_short(rows)}")
    messages = []
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != {"role", "content"}:
            raise ValueError(f"{where}: messages[{k}] must hold 'role' and 'content' alone, found {_short(row)}")
        if row["role"] not in ROLES:
            raise ValueError(f"{where}: messages[{k}] has role {row['role']!r}; accepted are {', '.join(ROLES)}")
        if not isinstance(row["content"], str):
            raise ValueError(f"{where}: messages[{k}] must have text as 'content', found {_short(row['content'])}")
        messages.append(Message(role=row["role"], content=row["content"]))
    return messages


def _regions(rows: Any, num_images: int, where: str) -> list[Region]:
    if not isinstance(rows, list):
        raise ValueError(f"{where}: field 'regions' must be a list, found {_short(rows)}")
    regions = []
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or not {"label", "box"} <= set(row) <= {"label", "box", "image"}:
            raise ValueError(f"{where}: regions[{k}] must hold 'label', 'box' and 'image', found {_short(row)}")
        box, image, label = row["box"], row.get("image", 0), row["label"]
        if not isinstance(label, str):
            raise ValueError(f"{where}: regions[{k}] must have text as 'label', found {_short(label)}")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
            raise ValueError(f"{where}: regions[{k}] must have a box of four numbers (pixels), found {_short(box)}")
        if box[2] <= box[0] or box[3] <= box[1]:
            raise ValueError(f"{where}: regions[{k}] must have a box with x0 < x1 and y0 < y1, found {_short(box)}")
        if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < num_images:
            raise ValueError(f"{where}: regions[{k}] is on image {image!r}, but the sample has {num_images} images")
        regions.append(Region(label=label, box=(box[0], box[1], box[2], box[3]), image=image))
    return regions


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
