"""Knowledge: what a real photograph shows, alone and in mosaics of four, and cards whose fact must be known.

Held out: one half of every photograph, and fonts.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from step3vl.data.corpus.assets import PHOTOS, font_names, photo, photo_region, photo_source
from step3vl.data.corpus.draft import Draft, Subset, Turn, letter_question, point_text, sample_turns
from step3vl.data.corpus.draw import canvas, draw_text, paper, text_size, weather
from step3vl.types import Region

CORNERS = ("top left", "top right", "bottom left", "bottom right")


def crop_box(rng: random.Random, number: int, level: int, held_out: bool) -> tuple[int, int, int, int]:
    """A square of the photograph, wholly inside the half that belongs to this side of the split."""
    x0, y0, x1, y1 = photo_region(number, held_out)
    short = min(x1 - x0, y1 - y0)
    size = round(short * rng.uniform(0.8 if level == 0 else 0.7, 1.0))
    x, y = rng.randint(x0, x1 - size), rng.randint(y0, y1 - size)
    return x, y, x + size, y + size


def _crop(rng: random.Random, number: int, level: int, held_out: bool, side: int) -> Image.Image:
    box = crop_box(rng, number, level, held_out)
    return photo(number).resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _credit(numbers: list[int]) -> tuple[str, str]:
    sources = dict.fromkeys(photo_source(k) for k in numbers)
    licences = dict.fromkeys(PHOTOS[k].licence for k in numbers)
    return "; ".join(sources), "; ".join(licences)


def photo_crop(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """One crop: "What is this?" -> "cat". Level 2 is photographed again and offers letters."""
    number = rng.randrange(len(PHOTOS))
    image = _crop(rng, number, level, held_out, {0: 64, 1: 64, 2: 128}[level])
    name = PHOTOS[number].name
    turn = Turn(question="What is this?", answer_text=name, answer_type="exact")
    if level == 2:
        image = weather(image, rng, angle=6.0)
        names = [entry.name for entry in PHOTOS if entry.name != name]
        turn = letter_question(rng, "What is this?", name, rng.sample(names, 3))
    source, licence = _credit([number])
    return Draft(turns=[turn], images=[image], source=source, licence=licence)


def mosaic(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Four photographs in one image: what is in a corner, where is the cat, point to it."""
    side = {2: 64, 3: 112, 4: 280}[level]
    numbers = rng.sample(range(len(PHOTOS)), 4)
    image = canvas(2 * side)
    possible = []
    for k, number in enumerate(numbers):
        x, y = (k % 2) * side, (k // 2) * side
        image.paste(_crop(rng, number, level, held_out, side), (x, y))
        box, name = (x, y, x + side, y + side), PHOTOS[number].name
        gold = [Region(label="answer", box=box)]
        kind = rng.randrange(3) if level >= 3 else 0  # one question a photograph: answers do not give others away
        if kind == 0:
            question, answer, answer_type = f"What is in the {CORNERS[k]}?", name, "exact"
        elif kind == 1:
            verb = "are" if name in ("coins", "galaxies") else "is"
            question, answer, answer_type = f"Where {verb} the {name}?", CORNERS[k], "exact"
        else:
            question, answer, answer_type = f"Point to the {name}.", point_text(box, image), "point"
        possible.append(Turn(question=question, answer_text=answer, answer_type=answer_type, regions=gold))
    if level == 4:
        image = weather(image, rng)
    source, licence = _credit(numbers)
    return Draft(turns=sample_turns(rng, possible, turns), images=[image], source=source, licence=licence)


# ------------------------------------------------------------------------------------------------ cards

_ELEMENTS = (
    "H:hydrogen He:helium Li:lithium Be:beryllium B:boron C:carbon N:nitrogen O:oxygen F:fluorine Ne:neon "
    "Na:sodium Mg:magnesium Al:aluminium Si:silicon P:phosphorus S:sulfur Cl:chlorine Ar:argon K:potassium "
    "Ca:calcium Sc:scandium Ti:titanium V:vanadium Cr:chromium Mn:manganese Fe:iron Co:cobalt Ni:nickel Cu:copper "
    "Zn:zinc"
)
ELEMENTS = tuple((name, symbol, k + 1) for k, (symbol, name) in enumerate(e.split(":") for e in _ELEMENTS.split()))
_CAPITALS = (
    "France:Paris Spain:Madrid Italy:Rome Germany:Berlin Austria:Vienna Poland:Warsaw Greece:Athens Norway:Oslo "
    "Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Portugal:Lisbon Hungary:Budapest "
    "Egypt:Cairo Kenya:Nairobi Ghana:Accra Japan:Tokyo China:Beijing India:Delhi Thailand:Bangkok Vietnam:Hanoi "
    "Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Australia:Canberra Iran:Tehran Iraq:Baghdad "
    "Nepal:Kathmandu"
)
CAPITALS = tuple((country, city) for country, city in (entry.split(":") for entry in _CAPITALS.split()))
Fact = tuple[str, str, str, str]  # what the card shows, question, answer, answer_type


def _facts(rng: random.Random) -> Fact:
    """A fact that the card does not spell out."""
    if rng.random() < 0.5:
        name, symbol, number = rng.choice(ELEMENTS)
        return rng.choice(
            [
                (symbol, "Which element is this?", name, "exact"),
                (name, "What is the symbol of this element?", symbol, "exact"),
                (symbol, "What is the atomic number of this element?", str(number), "number"),
            ]
        )
    country, capital = rng.choice(CAPITALS)
    forward, back = "What is its capital?", "Of which country is it the capital?"
    return rng.choice([(country, forward, capital, "exact"), (capital, back, country, "exact")])


def _card(rng: random.Random, text: str, side: int, held_out: bool) -> Image.Image:
    background, ink = paper(rng)
    image = canvas(side, side * 3 // 4, background)
    name = rng.choice(font_names(held_out, letters_only=True))
    size = max(10, side // 3)
    while text_size(text, name, size)[0] > side - 12:
        size -= 1
    width, height = text_size(text, name, size)
    ImageDraw.Draw(image).rectangle((2, 2, side - 3, image.height - 3), outline=ink)
    draw_text(image, ((side - width) // 2, (image.height - height) // 2), text, name, size, ink)
    return image


def cards(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """A card (1), a card with options (2), a mosaic of four (3), four images (4)."""
    if level <= 2:
        text, question, answer, kind = _facts(rng)
        image = _card(rng, text, 80 if level == 1 else 128, held_out)
        turn = Turn(question=question, answer_text=answer, answer_type=kind)
        if level == 2:
            others = [other for _, asked, other, _ in (_facts(rng) for _ in range(80)) if asked == question]
            wrong = sorted(set(others) - {answer})
            turn = letter_question(rng, question, answer, rng.sample(wrong, min(3, len(wrong))))
        return Draft(turns=[turn], images=[image])
    facts = [_facts(rng) for _ in range(4)]
    side = 120 if level == 3 else 240
    drawn = [_card(rng, fact[0], side, held_out) for fact in facts]
    places = CORNERS if level == 3 else ("first image", "second image", "third image", "last image")
    possible = []
    for where, (_, question, answer, kind) in zip(places, facts):
        possible.append(Turn(question=f"Look at the {where}. {question}", answer_text=answer, answer_type=kind))
    if level == 3:
        whole = canvas(2 * side, 2 * drawn[0].height)
        for k, card in enumerate(drawn):
            whole.paste(card, ((k % 2) * side, (k // 2) * card.height))
        drawn = [whole]
    return Draft(turns=sample_turns(rng, possible, turns), images=drawn)


SUBSETS = {
    "photo": Subset(photo_crop, (0, 1, 2)),
    "mosaic": Subset(mosaic, (2, 3, 4)),
    "cards": Subset(cards, (1, 2, 3, 4)),
}
