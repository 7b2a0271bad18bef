"""Questions beyond one scene of shapes: several images, charts, mazes. Split from `vqa` for length only."""

from __future__ import annotations

import random

import networkx as nx
from PIL import Image, ImageDraw

from step3vl.data.corpus.assets import font_names
from step3vl.data.corpus.draft import Draft, Turn, draw_number, held_out_layout, letter_question, sample_turns, yes_no
from step3vl.data.corpus.draw import RGB, canvas, dim, draw_shape, draw_text, paper, text_size, weather
from step3vl.data.corpus.scene import Item, free_boxes, pairs
from step3vl.data.corpus.words import WORDS
from step3vl.types import Region

# ------------------------------------------------------------------------------------------------ several images


def images(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Two to four images: which one holds a thing, what is in all, are two the same, what changed."""
    num = 2 if level == 3 else rng.randint(3, 4)
    side = 128 if level == 3 else rng.choice((192, 256))
    marked = rng.choice(pairs(held_out))  # in one image only
    shared = rng.choice([pair for pair in pairs(False) if pair != marked])
    rest = [pair for pair in pairs(False) if pair not in (marked, shared)]
    only = rng.randrange(num)
    scenes, drawn = [], []
    for k in range(num):
        chosen = [shared, *rng.sample(rest, rng.randint(2, 4)), *([marked] if k == only else [])]
        rng.shuffle(chosen)
        image = canvas(side, colour=dim(rng))
        boxes = free_boxes(rng, image, len(chosen), (18, side // 5))
        items = [Item(shape, colour, box) for (shape, colour), box in zip(chosen, boxes)]
        for item in items:
            draw_shape(image, item.shape, RGB[item.colour], item.box)
        scenes.append(items)
        drawn.append(weather(image, rng) if level == 4 else image)
    name = f"{marked[1]} {marked[0]}"
    regions = [i.region("answer", k) for k, items in enumerate(scenes) for i in items if i.name == name]
    which = f"Which image shows a {name}? Answer with its number."
    counts = [len(items) for items in scenes]
    common = {item.name for item in scenes[0]}.intersection(*[{i.name for i in items} for items in scenes[1:]])
    absent = [f"{c} {s}" for s, c in rest if f"{c} {s}" not in common]
    possible = [Turn(question=which, answer_text=str(only + 1), answer_type="number", regions=regions)]
    if not held_out:  # these do not name the held-out pair
        total = "How many shapes are there in all the images together?"
        possible.append(Turn(question=total, answer_text=str(sum(counts)), answer_type="number"))
        wrong = rng.sample(absent, 3)
        right = f"{shared[1]} {shared[0]}"
        possible.append(letter_question(rng, "Which of these is in every image?", right, wrong))
        more = f"Does image {num} show more shapes than image 1?"
        possible.append(Turn(question=more, answer_text=yes_no(counts[-1] > counts[0]), answer_type="exact"))
    else:
        k = rng.randrange(num)
        other = f"Does image {k + 1} show a {name}?"
        possible.append(Turn(question=other, answer_text=yes_no(k == only), answer_type="exact", regions=regions))
    return Draft(turns=sample_turns(rng, possible, turns), images=drawn)


# ------------------------------------------------------------------------------------------------ charts


def chart(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A bar chart with its values written or to be read off the axis. Held out: fonts, and numbers 3 modulo 7."""
    num = {2: 3, 3: 5, 4: 8}[level]
    width, height = {2: (128, 128), 3: (256, 192), 4: (640, 400)}[level]
    size = {2: 10, 3: 12, 4: 16}[level]
    name = rng.choice(font_names(held_out))
    labels = rng.sample([word.capitalize() for word in WORDS if len(word) <= {2: 4, 3: 4, 4: 6}[level]], num)
    values: list[int] = []
    while len(values) < num:
        value = draw_number(rng, 2, held_out)
        if value not in values:
            values.append(value)
    background, ink = paper(rng)
    image = canvas(width, height, background)
    draw = ImageDraw.Draw(image)
    base, top, left = height - size - 12, size + 14, 8 if level < 4 else 44
    step = (width - left - 8) / num
    if level == 4:
        for tick in range(0, 101, 20):
            y = base - (base - top) * tick // 100
            draw.line((left - 4, y, width - 8, y), fill=(128, 128, 128))
            draw_text(image, (6, y - size // 2 - 2), str(tick), name, size - 4, ink)
    draw.line((left, base, width - 8, base), fill=ink)
    colours = rng.sample([c for c in RGB if c not in ("white", "black", "grey", "yellow", "cyan")], 2)
    boxes = []
    for k, (label, value) in enumerate(zip(labels, values)):
        x0, x1 = int(left + step * (k + 0.2)), int(left + step * (k + 0.8))
        y = base - (base - top) * value // 100
        draw.rectangle((x0, y, x1, base - 1), fill=RGB[colours[k % 2]])
        boxes.append((x0, y, x1 + 1, base))
        middle = (x0 + x1) // 2
        draw_text(image, (middle - text_size(label, name, size)[0] // 2, base + 2), label, name, size, ink)
        text = str(value)
        draw_text(image, (middle - text_size(text, name, size)[0] // 2, y - size - 4), text, name, size, ink)
    if level == 4:
        image = weather(image, rng)
    order = sorted(range(num), key=values.__getitem__)
    a, b = rng.sample(range(num), 2)

    def about(question: str, answer: str, kind: str, k: int) -> Turn:
        region = Region(label="answer", box=boxes[k])
        return Turn(question=question, answer_text=answer, answer_type=kind, regions=[region])

    possible = [
        about("Which bar is highest?", labels[order[-1]], "exact", order[-1]),
        about("Which bar is lowest?", labels[order[0]], "exact", order[0]),
        about(f"What is the value of {labels[a]}?", str(values[a]), "number", a),
        about(f"Which bar has the value {values[b]}?", labels[b], "exact", b),
    ]
    if level >= 3:
        possible.append(about(f"What is {labels[a]} plus {labels[b]}?", str(values[a] + values[b]), "number", a))
        possible.append(about("Which bar is second highest?", labels[order[-2]], "exact", order[-2]))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


# ------------------------------------------------------------------------------------------------ mazes


def maze(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A maze with a green start and a red end. Is there a way, and how many steps is the shortest? Held out: walls."""
    num, cell = {2: (4, 24), 3: (6, 32), 4: (10, 40)}[level]
    while True:
        graph: nx.Graph = nx.grid_2d_graph(num, num)
        edges = sorted(graph.edges)
        walls = rng.sample(edges, round(len(edges) * rng.uniform(0.3, 0.5)))
        graph.remove_edges_from(walls)
        start, end = rng.sample(sorted(graph.nodes), 2)
        if held_out_layout((num, sorted(walls), start, end)) == held_out:
            break
    image = _draw_maze(rng, num, cell, graph, start, end, level)
    box = (start[1] * cell + 4, start[0] * cell + 4, (start[1] + 1) * cell + 4, (start[0] + 1) * cell + 4)
    regions = [Region(label="start", box=box)]
    open_way = nx.has_path(graph, start, end)
    question = "Is there a way from green to red?"
    possible = [Turn(question=question, answer_text=yes_no(open_way), answer_type="exact", regions=regions)]
    if open_way:
        steps = str(nx.shortest_path_length(graph, start, end))
        question = "How many steps is the shortest way from green to red?"
        possible.append(Turn(question=question, answer_text=steps, answer_type="number", regions=regions))
    exits = str(graph.degree[start])
    question = "How many ways lead out of the green cell?"
    possible.append(Turn(question=question, answer_text=exits, answer_type="number", regions=regions))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


def _draw_maze(
    rng: random.Random, num: int, cell: int, graph: nx.Graph, start: tuple[int, int], end: tuple[int, int], level: int
) -> Image.Image:
    background, ink = paper(rng)
    image = canvas(num * cell + 8, colour=background)
    draw = ImageDraw.Draw(image)
    for (row, column), name in ((start, "green"), (end, "red")):
        x, y = column * cell + 4, row * cell + 4
        draw.rectangle((x + 4, y + 4, x + cell - 4, y + cell - 4), fill=RGB[name])
    draw.rectangle((4, 4, num * cell + 4, num * cell + 4), outline=ink, width=2)
    for row in range(num):
        for column in range(num):
            x, y = (column + 1) * cell + 4, (row + 1) * cell + 4
            if column + 1 < num and not graph.has_edge((row, column), (row, column + 1)):
                draw.line((x, y - cell, x, y), fill=ink, width=2)
            if row + 1 < num and not graph.has_edge((row, column), (row + 1, column)):
                draw.line((x - cell, y, x, y), fill=ink, width=2)
    return weather(image, rng) if level == 4 else image
