"""Image to code: shapes to SVG, charts to the matplotlib calls that drew them, mock pages to HTML.

The source is drawn, not described: charts come from the very calls of their answer. Held out: shape and colour pairs,
fonts of charts and pages.
"""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

from step3vl.data.corpus.assets import font_names
from step3vl.data.corpus.draft import Draft, Subset, Turn, draw_number
from step3vl.data.corpus.draw import CELL, RGB, canvas, draw_text, paper, text_size, weather
from step3vl.data.corpus.scene import Item, pairs, place
from step3vl.data.corpus.words import WORDS


def shapes(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """One shape as a tag by cell (0) or pixel (1), or two to five as a small SVG, from the top down."""
    if level <= 1:
        image, (item,) = place(rng, [rng.choice(pairs(held_out))], level)
        text = _cell_tag(item) if level == 0 else _pixel_tag(item)
        turn = Turn(question="Write this as SVG.", answer_text=text, answer_type="exact", regions=[item.region()])
        return Draft(turns=[turn], images=[image])
    num = rng.randint(2, 3) if level == 2 else rng.randint(4, 5)
    image, items = place(rng, rng.sample(pairs(held_out), num), level)
    items.sort(key=lambda item: (item.box[1], item.box[0]))
    lines = [f'<svg width="{image.width}" height="{image.height}">', *map(_pixel_tag, items), "</svg>"]
    question = "Write this as SVG, from the top down."
    regions = [item.region() for item in items]
    turn = Turn(question=question, answer_text="\n".join(lines), answer_type="exact", regions=regions)
    return Draft(turns=[turn], images=[image])


def _cell_tag(item: Item) -> str:
    return f'<{item.shape} x="{item.box[0] // CELL}" y="{item.box[1] // CELL}" fill="{item.colour}"/>'


def _pixel_tag(item: Item) -> str:
    x, y, x1, _ = item.box
    return f'<{item.shape} x="{x}" y="{y}" size="{x1 - x}" fill="{item.colour}"/>'


# ------------------------------------------------------------------------------------------------ charts

Call = tuple[str, list[Any], dict[str, Any]]
TRAIN_FAMILIES = ("DejaVu Sans", "DejaVu Serif")
HELD_OUT_FAMILIES = ("STIXGeneral",)


def chart(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A matplotlib chart -> the calls on `ax` that drew it."""
    calls = _chart_calls(rng, level, held_out)
    inches = {2: (1.6, 1.28), 3: (2.56, 2.0), 4: (6.4, 4.0)}[level]
    family = rng.choice(HELD_OUT_FAMILIES if held_out else TRAIN_FAMILIES)
    image = draw_chart(calls, inches, family, 7 if level == 2 else 9)
    source = "\n".join(call_text(call) for call in calls)
    turn = Turn(question="Write the matplotlib calls that draw this.", answer_text=source, answer_type="exact")
    return Draft(turns=[turn], images=[image])


def _chart_calls(rng: random.Random, level: int, held_out: bool) -> list[Call]:
    num = {2: 3, 3: 4, 4: 6}[level]
    short = [word.capitalize() for word in WORDS if len(word) <= 5]
    labels = rng.sample(short, num)
    values = [draw_number(rng, 2, held_out) for _ in range(num)]
    colour = rng.choice(("red", "green", "blue", "orange"))
    kind = rng.choice(("bar", "plot", "scatter"))
    if kind == "bar":
        calls: list[Call] = [("bar", [labels, values], {"color": colour})]
    elif kind == "plot":
        calls = [("plot", [list(range(num)), values], {"color": colour, "marker": "o"})]
    else:
        calls = [("scatter", [list(range(num)), values], {"color": colour})]
    calls.append(("set_ylim", [0, 100], {}))
    if level >= 3:
        calls.append(("set_title", [rng.choice(short)], {}))
    if level == 4:
        others = [draw_number(rng, 2, held_out) for _ in range(num)]
        x = labels if kind == "bar" else list(range(num))
        calls.insert(1, ("plot", [x, others], {"color": "black", "label": rng.choice(short)}))
        calls += [("set_ylabel", [rng.choice(short)], {}), ("legend", [], {}), ("grid", [True], {})]
    return calls


def call_text(call: Call) -> str:
    """One call as source: ax.bar(["Fox", "Owl"], [31, 40], color="red")."""
    name, arguments, options = call
    parts = [repr(value) for value in arguments] + [f"{key}={value!r}" for key, value in options.items()]
    return f"ax.{name}({', '.join(parts)})".replace("'", '"')


def draw_chart(calls: list[Call], inches: tuple[float, float], family: str, size: int) -> Image.Image:
    """Carry out the calls on fresh axes, at 100 pixels an inch. About 30 ms."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": family, "font.size": size, "lines.markersize": 4}):
        figure = Figure(figsize=inches, dpi=100)
        figure.subplots_adjust(left=0.2, right=0.96, bottom=0.18, top=0.88)
        surface = FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        for name, arguments, options in calls:
            getattr(ax, name)(*arguments, **options)
        surface.draw()
        return Image.fromarray(np.asarray(surface.buffer_rgba())[..., :3].copy())


# ------------------------------------------------------------------------------------------------ pages

Element = tuple[str, str]


def html(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A mock page of headings, paragraphs, buttons, fields and lists -> its HTML."""
    num, width, size = {1: (1, 96, 12), 2: (3, 128, 12), 3: (6, 256, 14), 4: (11, 480, 18)}[level]
    elements: list[Element] = []
    for _ in range(num):
        tag = rng.choice(("h1", "p", "button", "li") if level > 1 else ("h1", "p", "button"))
        text = " ".join(rng.choice(WORDS) for _ in range(1 if level == 1 or tag == "button" else rng.randint(1, level)))
        elements.append((tag, text.capitalize()))
    name = rng.choice(font_names(held_out))
    image = _draw_page(rng, elements, width, size, name)
    if level == 4:
        image = weather(image, rng)
    turn = Turn(question="Write this page in HTML.", answer_text=page_source(elements), answer_type="exact")
    return Draft(turns=[turn], images=[image])


def page_source(elements: list[Element]) -> str:
    """One element a line; neighbouring list items share a <ul>."""
    lines = []
    for k, (tag, text) in enumerate(elements):
        if tag == "li" and (k == 0 or elements[k - 1][0] != "li"):
            lines.append("<ul>")
        lines.append(f"<{tag}>{text}</{tag}>")
        if tag == "li" and (k + 1 == len(elements) or elements[k + 1][0] != "li"):
            lines.append("</ul>")
    return "\n".join(lines)


def _draw_page(rng: random.Random, elements: list[Element], width: int, size: int, name: str) -> Image.Image:
    background, ink = paper(rng)
    heights = [(size + 8 if tag == "h1" else size) + 12 for tag, _ in elements]
    widest = max(text_size(text, name, size + 6 if tag == "h1" else size)[0] for tag, text in elements)
    image = canvas(max(width, widest + 32), sum(heights) + 12, background)
    draw = ImageDraw.Draw(image)
    y = 6
    for (tag, text), height in zip(elements, heights):
        if tag == "h1":
            draw_text(image, (8, y), text, name, size + 6, ink)
        elif tag == "button":
            span = text_size(text, name, size)[0] + 12
            draw.rounded_rectangle((8, y, 8 + span, y + size + 8), 4, fill=RGB["grey"], outline=ink)
            draw_text(image, (14, y + 2), text, name, size, ink)
        elif tag == "li":
            draw.ellipse((12, y + size // 2, 16, y + size // 2 + 4), fill=ink)
            draw_text(image, (22, y), text, name, size, ink)
        else:
            draw_text(image, (8, y), text, name, size, ink)
        y += height
    return image


SUBSETS = {
    "shapes": Subset(shapes, (0, 1, 2, 3)),
    "chart": Subset(chart, (2, 3, 4)),
    "html": Subset(html, (1, 2, 3, 4)),
}
