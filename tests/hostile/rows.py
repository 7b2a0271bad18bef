"""JSON of a sample: wrong kinds, depths, sizes, and names that are paths."""

import json

from step3vl.data.schema import from_json

TURNS = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]
GOOD = {"id": "x", "domain": "vqa", "subset": "s", "level": 0, "messages": TURNS, "images": ["0.png"]}


def of(**changes):
    def case(folder):
        text = json.dumps({**GOOD, **changes})
        return lambda: from_json(json.loads(text), [], "the row")

    return case


def text(data):
    return lambda folder: lambda: from_json(json.loads(data), [], "the row")


CASES = {
    "no object": text("[]"),
    "nothing": text("null"),
    "a number of 5,000 digits": text('{"id": ' + "9" * 4000 + "}"),
    "nan": text('{"id": NaN, "level": Infinity}'),
    "keys that repeat": text('{"id": "a", "id": "b"}'),
    "half a surrogate": text('{"id": "\\ud800", "messages": []}'),
    "an id that climbs": of(id="../../owned"),
    "an id of a megabyte": of(id="x" * 10**6),
    "an id that is a list": of(id=["x"]),
    "a level of a billion": of(level=10**9),
    "a level in words": of(level="low"),
    "messages that are text": of(messages="hello"),
    "messages that are numbers": of(messages=[1, 2]),
    "100,000 messages": of(messages=TURNS * 50_000),
    "a role that is not": of(messages=[{"role": "root", "content": "x"}]),
    "content that is a list": of(messages=[{"role": "user", "content": [1]}]),
    "10,000 marks": of(messages=[{"role": "user", "content": "<image>" * 10_000}]),
    "content of 20 MB": of(messages=[{"role": "user", "content": "x" * 20_000_000}, TURNS[1]]),
    "images that are paths": of(images=["/etc/passwd"]),
    "images that are addresses": of(images=["http://example.com/a.png"]),
    "images that are numbers": of(images=[1]),
    "regions that are text": of(regions="all"),
    "a region of nan": of(regions=[{"label": "a", "box": [float("nan")] * 4}]),
    "a region in image 99": of(regions=[{"label": "a", "box": [0, 0, 1, 1], "image": 99}]),
    "a region of three numbers": of(regions=[{"label": "a", "box": [0, 0, 1]}]),
    "an answer type that is a class": of(answer="x", answer_type="__class__"),
    "fields that are not": of(__class__="x", exec="rm"),
}
