"""Screens: click a button, menu, field or icon; say "none" when it is not there; read the state of a form.

Held out: layouts. A layout is what stands where, by kind and span; labels are drawn afresh.
"""

from __future__ import annotations

import random

from step3vl.data.corpus.assets import font_names
from step3vl.data.corpus.draft import Draft, Subset, Turn, held_out_layout, point_text, sample_turns, yes_no
from step3vl.data.corpus.draw import CELL, GRID, canvas, cell_box, draw_glyph, jitter
from step3vl.data.corpus.window import LABELS, Widget, screen
from step3vl.data.corpus.words import pseudo_word
from step3vl.types import Region

SPANS = ((1, 1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (2, 2), (1, 3), (3, 1), (4,))


def click(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """ "Click OK." -> a point in the button. From level 2 on windows; one in eight asks for what is not there."""
    if level <= 1:
        return _buttons(rng, level, held_out, turns)
    image, widgets = screen(rng, level, held_out)
    shown = {widget.label for widget in widgets}
    targets = [widget for widget in widgets if sum(widget.asking == other.asking for other in widgets) == 1]
    regions = [Region(label=widget.label, box=widget.box) for widget in widgets]
    possible = []
    for widget in targets:
        gold = Region(label="answer", box=widget.box)
        others = [region for region in regions if region.box != widget.box]
        answer = point_text(widget.box, image)
        possible.append(Turn(question=widget.asking, answer_text=answer, answer_type="point", regions=[gold, *others]))
    chosen = sample_turns(rng, possible, turns)
    for k in range(len(chosen)):
        if rng.random() < 1 / 8:
            missing = rng.choice([label for label in LABELS if label not in shown])
            chosen[k] = Turn(question=f"Click {missing}.", answer_text="none", answer_type="exact", regions=regions)
    return Draft(turns=chosen, images=[image])


def _buttons(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Four rows of buttons; each spans whole cells of its row and carries one or two capitals."""
    while True:
        layout = [[(span, rng.random() < 0.8) for span in rng.choice(SPANS)] for _ in range(GRID)]
        if sum(shown for row in layout for _, shown in row) >= 2 and held_out_layout(layout) == held_out:
            break
    image = canvas()
    name = rng.choice(font_names(held_out=False, letters_only=True))
    fill = (rng.randint(20, 60), rng.randint(20, 60), rng.randint(70, 130))
    regions: list[Region] = []
    for row, spans in enumerate(layout):
        column = 0
        for span, shown in spans:
            if shown:
                label = pseudo_word(rng, min(span, rng.randint(1, 2)))
                while label in [region.label for region in regions]:
                    label = pseudo_word(rng, min(span, 2))
                box = cell_box(row, column, span)
                dx, dy = jitter(rng, level)
                inset = 0 if level == 0 else 2  # a moved button stays in its cells
                x0, y0, x1, y1 = box[0] + inset + dx, box[1] + inset + dy, box[2] - inset + dx, box[3] - inset + dy
                image.paste(fill, (x0 + 1 - inset // 2, y0 + 1 - inset // 2, x1 - 1 + inset // 2, y1 - 1 + inset // 2))
                for k, character in enumerate(label):
                    x = box[0] + CELL * k + dx
                    draw_glyph(image, character, name, (x, y0, x + CELL, y1), 13 if level == 0 else 11)
                regions.append(Region(label=label, box=(x0, y0, x1, y1)))
            column += span
    possible = []
    for region in regions:
        others = [other for other in regions if other is not region]
        gold = Region(label="answer", box=region.box)
        answer = point_text(region.box, image)
        question = f"Click {region.label}."
        possible.append(Turn(question=question, answer_text=answer, answer_type="point", regions=[gold, *others]))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


def state(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """What a form says: is a box ticked, what stands in a field, how many boxes are ticked."""
    while True:
        image, widgets = screen(rng, level, held_out)
        boxes = [widget for widget in widgets if widget.kind == "checkbox"]
        fields = [widget for widget in widgets if widget.kind == "field"]
        if boxes and fields:
            break
    possible = [_state_turn(widget) for widget in [*boxes, *fields]]
    ticked = str(sum(widget.value == "on" for widget in boxes))
    possible.append(Turn(question="How many boxes are ticked?", answer_text=ticked, answer_type="number"))
    return Draft(turns=sample_turns(rng, possible, turns), images=[image])


def _state_turn(widget: Widget) -> Turn:
    regions = [Region(label="answer", box=widget.box)]
    if widget.kind == "checkbox":
        question, answer = f"Is {widget.label} ticked?", yes_no(widget.value == "on")
    else:
        question, answer = f"What is in the {widget.label} field?", widget.value
    return Turn(question=question, answer_text=answer, answer_type="exact", regions=regions)


SUBSETS = {"click": Subset(click, (0, 1, 2, 3, 4)), "state": Subset(state, (2, 3, 4))}
