"""Mock windows drawn with Pillow: title bar, menus, toolbar, side bar, forms, buttons; light and dark; to 960x540."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from step3vl.data.corpus.draft import held_out_layout
from step3vl.data.corpus.draw import RGB, SHAPES, Colour, canvas, draw_shape, draw_text, text_size
from step3vl.data.corpus.words import WORDS

_LABELS = (
    "Save Open Cancel Apply Reset Send Delete Copy Paste Print Search Next Back Help Retry Login Export "
    "Import Upload Share Undo Redo Sort Filter Refresh Install Update Pause Stop Play Add Remove Rename Archive "
    "Sync"
)
LABELS = tuple(_LABELS.split())
FIELDS = ("Name", "Email", "City", "Phone", "Street", "Title", "Owner", "Code", "Date", "Topic", "Country", "Team")
BOXES = ("Autosave", "Dark mode", "Alerts", "Sound", "Backup", "Sharing", "Grid", "Ruler", "Preview", "Spelling")
MENUS = ("File", "Edit", "View", "Tools", "Window", "Insert", "Format", "Go")


Window = tuple[int, int, int, int]


@dataclass(slots=True)
class Widget:
    """Something on the screen that can be asked for. `value` is a field's text or a checkbox's "on" or "off"."""

    kind: str
    label: str
    box: tuple[int, int, int, int]
    value: str = ""

    @property
    def asking(self) -> str:
        words = {
            "menu": f"Open the {self.label} menu.",
            "field": f"Click the {self.label} field.",
            "checkbox": f"Click the {self.label} box.",
            "icon": f"Click the {self.label} icon.",
            "close": "Close the window.",
            "item": f"Select {self.label}.",
        }
        return words.get(self.kind, f"Click {self.label}.")


@dataclass(slots=True)
class Theme:
    desk: Colour
    panel: Colour
    face: Colour
    edge: Colour
    ink: Colour
    accent: Colour
    font: str
    size: int


def theme(rng: random.Random, level: int) -> Theme:
    name = rng.choice(("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Bold", "STIXGeneralBol"))
    size = {2: 11, 3: 12, 4: rng.randint(11, 14)}[level]
    accent = rng.choice([(40, 90, 200), (180, 60, 60), (30, 130, 90), (120, 60, 160)])
    if rng.random() < 0.4:
        return Theme((20, 22, 26), (38, 40, 46), (60, 63, 70), (95, 98, 106), (230, 232, 236), accent, name, size)
    return Theme((150, 165, 180), (245, 246, 248), (222, 225, 230), (165, 170, 178), (20, 22, 26), accent, name, size)


def screen(rng: random.Random, level: int, held_out: bool) -> tuple[Image.Image, list[Widget]]:
    """A screen and everything on it that can be asked for; its layout is on the wanted side of the split."""
    while True:
        layout = _layout(rng, level)
        if held_out_layout(layout) == held_out:
            break
    width, height = {2: [(128, 112), (144, 96)], 3: [(256, 192), (240, 240)], 4: [(640, 360), (960, 540)]}[level][
        rng.randrange(2)
    ]
    look = theme(rng, level)
    image = canvas(width, height, look.desk)
    widgets: list[Widget] = []
    labels = rng.sample(LABELS, len(LABELS))
    names = {"field": rng.sample(FIELDS, len(FIELDS)), "checkbox": rng.sample(BOXES, len(BOXES))}
    window = (0, 0, width, height) if level < 4 else (24, 16, width - rng.choice((24, 80)), height - 40)
    if level == 4:
        _taskbar(rng, image, look, widgets)
    body = _frame(rng, image, look, window, layout, widgets)
    _form(rng, image, look, body, layout, labels, names, widgets)
    return image, widgets


def _layout(rng: random.Random, level: int) -> tuple:
    """(menus?, number of toolbar icons, side bar items, columns of rows by kind, where the buttons stand)."""
    kinds = ("field", "checkbox", "button")
    if level == 2:
        return (False, 0, 0, (tuple(rng.choice(kinds) for _ in range(3)),), rng.choice(("left", "right")))
    columns = rng.randint(1, 2) if level == 3 else rng.randint(2, 4)
    fewest, most = (3, 4) if level == 3 else (9, 12)
    rows = tuple(tuple(rng.choice(kinds) for _ in range(rng.randint(fewest, most))) for _ in range(columns))
    icons = rng.randint(0, 4) if level == 3 else rng.randint(4, 7)
    side = 0 if level == 3 else rng.randint(0, 6)
    return (rng.random() < 0.7, icons, side, rows, rng.choice(("left", "right")))


def _frame(
    rng: random.Random, image: Image.Image, look: Theme, window: Window, layout: tuple, out: list[Widget]
) -> Window:
    """Title bar, menus, toolbar and side bar. Returns what is left for the form."""
    draw = ImageDraw.Draw(image)
    x0, y0, x1, y1 = window
    line = look.size + 8
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=look.panel, outline=look.edge)
    draw.rectangle((x0, y0, x1 - 1, y0 + line), fill=look.accent)
    draw_text(image, (x0 + 6, y0 + 2), rng.choice(WORDS).capitalize(), look.font, look.size, (255, 255, 255))
    cross = (x1 - line, y0 + 2, x1 - 4, y0 + line - 2)
    draw.line((cross[0] + 4, cross[1] + 4, cross[2] - 4, cross[3] - 4), fill=(255, 255, 255), width=2)
    draw.line((cross[0] + 4, cross[3] - 4, cross[2] - 4, cross[1] + 4), fill=(255, 255, 255), width=2)
    out.append(Widget("close", "close", cross))
    y0 += line + 2
    menus, num_icons, num_items, _, _ = layout
    if menus:
        x = x0 + 4
        for label in rng.sample(MENUS, len(MENUS))[: 4 if x1 - x0 < 400 else 6]:
            width = text_size(label, look.font, look.size)[0] + 12
            draw_text(image, (x + 6, y0 + 1), label, look.font, look.size, look.ink)
            out.append(Widget("menu", label, (x, y0, x + width, y0 + line)))
            x += width
        y0 += line
    if num_icons:
        side = line + 2
        colours = rng.sample(["red", "green", "blue", "yellow", "magenta", "cyan"], min(6, num_icons))
        for k, colour in enumerate(colours):
            box = (x0 + 6 + k * (side + 6), y0 + 2, x0 + 6 + k * (side + 6) + side, y0 + 2 + side)
            draw.rounded_rectangle((box[0], box[1], box[2] - 1, box[3] - 1), 3, fill=look.face, outline=look.edge)
            shape = rng.choice(SHAPES)
            draw_shape(image, shape, RGB[colour], (box[0] + 3, box[1] + 3, box[2] - 3, box[3] - 3))
            out.append(Widget("icon", f"{colour} {shape}", box))
        y0 += side + 6
    if num_items:
        width = (x1 - x0) // 5
        draw.rectangle((x0, y0, x0 + width, y1 - 1), fill=look.face, outline=look.edge)
        for k, word in enumerate(rng.sample([w.capitalize() for w in WORDS if len(w) <= 7], num_items)):
            top = y0 + 6 + k * (line + 4)
            draw_text(image, (x0 + 10, top + 2), word, look.font, look.size, look.ink)
            out.append(Widget("item", word, (x0 + 2, top, x0 + width - 1, top + line + 2)))
        x0 += width
    return x0 + 4, y0 + 4, x1 - 4, y1 - 4


def _form(
    rng: random.Random,
    image: Image.Image,
    look: Theme,
    body: Window,
    layout: tuple,
    labels: list[str],
    names: dict[str, list[str]],
    out: list[Widget],
) -> None:
    """Columns of fields, checkboxes and buttons. What does not fit is left out."""
    columns, side = layout[3], layout[4]
    draw = ImageDraw.Draw(image)
    line = look.size + 8
    width = (body[2] - body[0]) // len(columns)
    for c, rows in enumerate(columns):
        x0, y = body[0] + c * width, body[1]
        for kind in rows:
            if kind in names and not names[kind]:
                kind = "button"
            if y + line > body[3] or not labels:
                break
            if kind == "button":
                label = labels.pop()
                span = text_size(label, look.font, look.size)[0] + 16
                x = x0 + 2 if side == "left" else x0 + width - span - 4
                box = (x, y, x + span, y + line)
                draw.rounded_rectangle((x, y, x + span - 1, y + line - 1), 4, fill=look.face, outline=look.edge)
                draw_text(image, (x + 8, y + 2), label, look.font, look.size, look.ink)
                out.append(Widget("button", label, box))
            elif kind == "checkbox":
                label, on = names[kind].pop(), rng.random() < 0.5
                box = (x0 + 4, y + 3, x0 + 4 + line - 6, y + line - 3)
                draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=look.face, outline=look.ink)
                if on:
                    middle = (box[1] + box[3]) // 2
                    tick = [(box[0] + 2, middle), (box[0] + 5, box[3] - 4), (box[2] - 3, box[1] + 3)]
                    draw.line(tick, fill=look.ink, width=2)
                end = draw_text(image, (box[2] + 5, y + 2), label, look.font, look.size, look.ink)[2]
                out.append(Widget("checkbox", label, (box[0], box[1], end, box[3]), "on" if on else "off"))
            else:
                label, text = names[kind].pop(), rng.choice([w for w in WORDS if len(w) <= 5])
                end = draw_text(image, (x0 + 4, y + 2), label, look.font, look.size, look.ink)[2]
                box = (max(end + 6, x0 + width // 3), y, x0 + width - 6, y + line)
                inside = (255, 255, 255) if look.panel[0] > 128 else (15, 16, 18)
                draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=inside, outline=look.edge)
                draw_text(image, (box[0] + 5, y + 2), text, look.font, look.size, look.ink)
                out.append(Widget("field", label, box, text))
            y += line + 6


def _taskbar(rng: random.Random, image: Image.Image, look: Theme, out: list[Widget]) -> None:
    draw = ImageDraw.Draw(image)
    top = image.height - 28
    draw.rectangle((0, top, image.width, image.height), fill=look.face)
    for k in range(rng.randint(3, len(SHAPES))):
        shape = SHAPES[k]
        box = (8 + 32 * k, top + 4, 28 + 32 * k, top + 24)
        draw_shape(image, shape, (128, 128, 128), box)
        out.append(Widget("icon", f"grey {shape}", box))
    clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    draw_text(image, (image.width - 52, top + 6), clock, look.font, 12, look.ink)
