"""The stored form of a sample: there and back, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import pytest
from PIL import Image

from step3vl.data.schema import from_json, to_json
from step3vl.types import Message, Region, Sample


def sample() -> Sample:
    return Sample(
        id="train-grounding-point-0-000001",
        domain="grounding",
        subset="point",
        level=0,
        messages=[
            Message(role="user", content="<image>Point to the red circle."),
            Message(role="assistant", content="(125, 375)"),
        ],
        images=[Image.new("RGB", (64, 64))],
        answer="(125, 375)",
        answer_type="point",
        regions=[Region(label="answer", box=(0, 16, 16, 32))],
        source="somewhere",
        licence="CC0-1.0",
    )


def test_round_trip_keeps_every_field():
    original = sample()
    row = to_json(original)
    assert row["images"] == ["0.png"]
    assert row["regions"] == [{"label": "answer", "box": [0, 16, 16, 32], "image": 0}]
    assert from_json(row, original.images, "shard:key") == original


BREAKS = [
    (lambda r: r.pop("level"), "field 'level' is missing"),
    (lambda r: r.pop("licence"), "field 'licence' is missing"),
    (lambda r: r.update(level=5), "one of 0, 1, 2, 3, 4, found 5"),
    (lambda r: r.update(level=True), "found True"),
    (lambda r: r.update(level=1.0), "found 1.0"),
    (lambda r: r.update(id=""), "field 'id'"),
    (lambda r: r.update(licens="x"), "unknown field 'licens'"),
    (lambda r: r.update(messages=[]), "at least one message"),
    (lambda r: r["messages"][0].update(role="human"), "messages[0] has role 'human'; accepted are system, user"),
    (lambda r: r["messages"][1].update(content=7), "messages[1] must have text"),
    (lambda r: r["messages"][0].update(content="Point."), "has 0 <image> marks for 1 images"),
    (lambda r: r["messages"][1].update(content="<image>"), "has 2 <image> marks for 1 images"),
    (lambda r: r.update(answer_type="points"), "'points'; accepted are exact, letter, contains, number, math, point"),
    (lambda r: r.update(answer=None), "'answer' and 'answer_type' must be given together"),
    (lambda r: r.update(regions=[]), "no region labelled 'answer', which a point answer needs"),
    (lambda r: r["regions"][0].update(box=[0, 16, 16]), "regions[0] must have a box of four numbers"),
    (lambda r: r["regions"][0].update(box=[0, 16, 0, 32]), "x0 < x1"),
    (lambda r: r["regions"][0].update(box=[0, float("nan"), 16, 32]), "four numbers"),
    (lambda r: r["regions"][0].update(image=1), "on image 1, but the sample has 1 images"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_each_error_names_place_and_field(damage, message):
    row = to_json(sample())
    damage(row)
    with pytest.raises(ValueError) as error:
        from_json(row, sample().images, "a.tar:key7")
    assert str(error.value).startswith("a.tar:key7: ")
    assert message in str(error.value)


def test_a_row_that_is_no_object():
    with pytest.raises(ValueError, match="must be an object, found list"):
        from_json([1], [], "a.tar:k")


def test_optional_fields_have_their_defaults():
    row = to_json(sample())
    for name in ("answer", "answer_type", "regions"):
        del row[name]
    read = from_json(row, sample().images, "a.tar:k")
    assert read.answer is None and read.answer_type is None and read.regions == []
