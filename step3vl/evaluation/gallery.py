"""One HTML file about an evaluation: scores, and for each benchmark the first cases that went wrong, to look at.

Where a place was asked for, the gold area and the answer are drawn into the image; where text was to be read, what
differs is coloured. Images are small copies inside the file.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from .benchmark import Benchmark, Case
from .extract import coordinates, final_text
from .runner import Record

NUM_SHOWN = 12
SIDE = 360
"""Longest side of an image on the page, in pixels."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } h2 { margin-top: 2em }
.case { display: grid; grid-template-columns: 380px 1fr; gap: 1.2em; border-top: 1px solid #ddd; padding: 1em 0 }
.case img { max-width: 360px; min-width: 160px; image-rendering: pixelated; border: 1px solid #ccc }
pre { white-space: pre-wrap; margin: .2em 0; font-size: 13px }
.gold { color: #0a7d32 } .said { color: #b3261e } del { background: #fbdad7; text-decoration: none }
ins { background: #d5f2dc; text-decoration: none } small { color: #666 }
"""


def write_gallery(
    out: Path, suite: Mapping[str, Benchmark], records: Sequence[Record], metrics: Mapping[str, Any]
) -> Path:
    """Write the page; returns its path."""
    facts = metrics["provenance"]
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(str(facts['label']))}</title>"]
    parts += [f"<style>{STYLE}</style><h1>{html.escape(str(facts['label']))}</h1>"]
    parts += [f"<p><small>{html.escape(facts['command'])}<br>{facts['time']}, commit {facts['commit']}, "]
    parts += [f"{html.escape(facts['device'])}, model {facts['model_hash']}</small></p>", _table(metrics["scores"])]
    for name, benchmark in suite.items():
        own = [record for record in records if record.benchmark == name]
        wrong = [record for record in own if record.score < 1 and not record.sample][:NUM_SHOWN]
        num_wrong = sum(record.score < 1 for record in own)
        parts.append(f"<h2>{html.escape(name)}</h2><p>{num_wrong} of {len(own)} answers are not right.</p>")
        cases = _find(benchmark, {record.id for record in wrong})
        parts += [_case(record, cases[record.id]) for record in wrong if record.id in cases]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts), encoding="utf-8")
    return out


def _find(benchmark: Benchmark, ids: set[str]) -> dict[str, Case]:
    """The cases of these ids, with their images."""
    found: dict[str, Case] = {}
    for case in benchmark.stream():
        if len(found) == len(ids):
            break
        if case.id in ids:
            found[case.id] = case
    return found


def _table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    keys = ("headline", "low", "high", "blind", "majority")
    head = "".join(f"<th>{key}</th>" for key in ("benchmark", "score", "from", "to", "blind", "majority", "cases"))
    rows = []
    for name, s in scores.items():
        cells = "".join(f"<td>{s[key]:.3f}</td>" for key in keys)
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}<td>{s['num_cases']}</td></tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _case(record: Record, case: Case) -> str:
    images = "".join(f"<img src='{_embed(image)}'>" for image in drawn(case, record.said))
    said = (
        difference(final_text(record.said)[:2000], case.answer) if case.answer_type in ("exact", "contains") else None
    )
    answer = said or html.escape(record.said[-2000:] or "(nothing)")
    note = " cut by the limit" if record.truncated else " no answer found" if record.unreadable else ""
    return (
        f"<div class='case'><div>{images}</div><div><small>{html.escape(record.id)}{note}</small>"
        f"<pre>{html.escape(record.question[:1500])}</pre><pre class='gold'>{html.escape(case.answer)}</pre>"
        f"<pre class='said'>{answer}</pre></div></div>"
    )


def drawn(case: Case, said: str) -> list[Image.Image]:
    """Small copies of a case's images; the gold area in green and the answer in red where a place was asked for."""
    small = []
    for image in case.prompt.images:
        copy = image.convert("RGB")
        copy.thumbnail((SIDE, SIDE))
        small.append(copy)
    if case.answer_type not in ("point", "box") or not small:
        return small
    page = ImageDraw.Draw(small[0])
    width, height = small[0].size
    for polygon in _gold_areas(case):
        page.polygon([(x * width, y * height) for x, y in polygon], outline=(10, 160, 60), width=2)
    found = coordinates(said, 2 if case.answer_type == "point" else 4)
    if found is not None:
        scale = 1.0 if max(found) <= 1 else 1000.0
        x, y, *rest = (value / scale * (width, height)[i % 2] for i, value in enumerate(found))
        if rest and rest[0] > x and rest[1] > y:
            page.rectangle((x, y, *rest), outline=(200, 30, 30), width=2)
        elif not rest:
            page.ellipse((x - 5, y - 5, x + 5, y + 5), outline=(200, 30, 30), width=2)
    return small


def _gold_areas(case: Case) -> list[list[tuple[float, float]]]:
    """Gold areas in shares of the first image."""
    if "polygon" in case.gold:
        return [case.gold["polygon"]] if case.gold["polygon"] else []
    boxes = [case.gold["box"]] if "box" in case.gold else []
    width, height = case.prompt.images[0].size
    for region in case.regions:
        if region.label == "answer":
            x0, y0, x1, y1 = region.box
            boxes.append((x0 / width, y0 / height, x1 / width, y1 / height))
    return [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in boxes]


def difference(said: str, gold: str) -> str:
    """What was said, as HTML: wrong characters marked as deleted, missing ones as inserted."""
    parts = []
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, said, gold, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(html.escape(said[a0:a1]))
            continue
        if a1 > a0:
            parts.append(f"<del>{html.escape(said[a0:a1])}</del>")
        if b1 > b0:
            parts.append(f"<ins>{html.escape(gold[b0:b1])}</ins>")
    return "".join(parts)


def _embed(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
