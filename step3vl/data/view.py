"""A contact sheet of a shard: what the samples look like, where their regions are, and what is asked and answered."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from step3vl.data.corpus.assets import font
from step3vl.data.shards import ShardReader
from step3vl.types import IMAGE_MARK, Sample

TILE = 168
"""Side in pixels of the square in which a sample's images are shown."""
TEXT_LINES = 7
COLUMNS = 6
FONT, SIZE, LINE = "DejaVuSans", 10, 13
ANSWER, OTHER = (0, 200, 60), (150, 150, 150)


def contact_sheet(shard_path: str | Path, out_png: str | Path, num: int = 24) -> Path:
    """Draw the first `num` samples of a shard to a PNG; returns its path.

    Small images are enlarged with square pixels. The answer's region is green, others thin and grey. Text-only samples
    are panels of text. Raises ShardError or SampleError for a shard that cannot be read.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    reader = ShardReader(shard_path, strict=False)
    samples = [reader.read(i) for i in range(min(num, len(reader)))]
    columns = min(COLUMNS, max(1, len(samples)))
    rows = max(1, -(-len(samples) // columns))
    width, height = TILE + 12, TILE + TEXT_LINES * LINE + 16
    sheet = Image.new("RGB", (columns * width + 12, rows * height + 30), (250, 250, 250))
    title = f"{Path(shard_path).name}: {len(samples)} of {len(reader)} samples"
    if reader.index.damage or reader.index.broken:
        title += f"; {len(reader.index.broken)} broken{'; ' + reader.index.damage if reader.index.damage else ''}"
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), title, font=font(FONT, 12), fill=(0, 0, 0))
    for k, sample in enumerate(samples):
        x, y = 12 + (k % columns) * width, 30 + (k // columns) * height
        if sample.images:
            sheet.paste(picture(sample, TILE), (x, y))
            caption = _caption(sample)
        else:
            draw.rectangle((x, y, x + TILE, y + TILE), fill=(255, 255, 255), outline=OTHER)
            question, answer = _last_turn(sample)
            panel = [*_wrap(question, TILE - 12), "", *_wrap(answer, TILE - 12)]
            _write(draw, (x + 6, y + 4), panel, (TILE - 8) // LINE, (0, 0, 0))
            caption = [*_head(sample), *_wrap(f"answer: {sample.answer} ({sample.answer_type})", TILE)]
        _write(draw, (x, y + TILE + 4), caption, TEXT_LINES, (40, 40, 40))
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png)
    return out_png


def picture(sample: Sample, side: int) -> Image.Image:
    """All images of a sample with their regions, side by side or in a square, within `side` x `side` pixels."""
    num = len(sample.images)
    across = 1 if num == 1 else 2 if num <= 4 else 3
    cell = side // across
    whole = Image.new("RGB", (side, side), (225, 225, 225))
    for k, image in enumerate(sample.images):
        scale = (cell - 2 * (num > 1)) / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        shown = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        draw = ImageDraw.Draw(shown)
        for region in sorted(sample.regions, key=lambda region: region.label == "answer"):
            if region.image != k:
                continue
            gold = region.label == "answer"
            x0, y0, x1, y1 = (value * scale for value in region.box)
            box = (x0, y0, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1))
            draw.rectangle(box, outline=ANSWER if gold else OTHER, width=2 if gold else 1)
            if gold and sample.answer_type == "point":
                x, y = (x0 + x1) / 2, (y0 + y1) / 2
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ANSWER, outline=(0, 0, 0))
        x, y = (k % across) * cell + (cell - size[0]) // 2, (k // across) * cell + (cell - size[1]) // 2
        whole.paste(shown, (x, y))
    return whole


def _last_turn(sample: Sample) -> tuple[str, str]:
    question, answer = sample.messages[-2].content if len(sample.messages) > 1 else "", sample.messages[-1].content
    return question.replace(IMAGE_MARK, ""), answer


def _head(sample: Sample) -> list[str]:
    size = ", ".join(f"{image.width}x{image.height}" for image in sample.images[:1]) or "text"
    many = f" x{len(sample.images)}" if len(sample.images) > 1 else ""
    return [f"{sample.subset} level {sample.level} #{sample.id.rpartition('-')[2].lstrip('0') or '0'} {size}{many}"]


def _caption(sample: Sample) -> list[str]:
    question, answer = _last_turn(sample)
    return [*_head(sample), *_wrap(question, TILE)[:5], *_wrap("> " + answer, TILE)]


def _wrap(text: str, width: int) -> list[str]:
    """Lines no wider than `width` pixels; words that are too long are cut."""
    face, lines = font(FONT, SIZE), []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            candidate = f"{line} {word}" if line else word
            if face.getlength(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = word
            while face.getlength(line) > width:
                cut = next(n for n in range(len(line) - 1, 0, -1) if face.getlength(line[:n]) <= width)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], limit: int, ink: tuple[int, int, int]
) -> None:
    shown = lines if len(lines) <= limit else [*lines[: limit - 1], "..."]
    for k, line in enumerate(shown):
        draw.text((at[0], at[1] + k * LINE), line, font=font(FONT, SIZE), fill=ink)
