"""Images of records: kept byte for byte, found inside one folder only, and refused in one sentence."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from step3vl.data.importers.pictures import Pictures
from step3vl.data.importers.record import Refused
from tests.data.importers.drawn import EXTENSIONS, encoded, pictures


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "imgs")


def load(folder, reference, source="/elsewhere/a.json"):
    return Pictures(folder).load(reference, "field 'image'", Path(source))


def refusal(folder, reference, source="/elsewhere/a.json"):
    with pytest.raises(Refused) as error:
        load(folder, reference, source)
    assert str(error.value).startswith("field 'image'") and "\n" not in str(error.value)
    return error.value.kind, str(error.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_what_a_shard_can_hold_is_kept_byte_for_byte(folder, format):
    name = f"coco/1.{EXTENSIONS[format]}"
    image, data = load(folder, name)
    assert data == (folder / name).read_bytes()
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(folder / name).convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "BMP"])
def test_the_rest_becomes_png_with_the_same_pixels(folder, format):
    name = f"coco/1.{EXTENSIONS[format]}"
    image, data = load(folder, name)
    stored = Image.open(io.BytesIO(data))
    assert stored.format == "PNG" and np.array_equal(np.asarray(stored), np.asarray(image))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(folder / name).convert("RGB")))


def test_every_way_to_give_an_image(folder):
    data = encoded("PNG", 2)
    inline = "data:image/png;base64," + base64.b64encode(data).decode()
    path = str(folder.absolute() / "coco/2.png")
    for reference in (
        "coco/2.png",
        "./coco/../coco/2.png",
        path,
        f"file://{path}",
        inline,
        data,
        {"bytes": data, "path": "ignored.png"},
        {"bytes": None, "path": "coco/2.png"},
        {"url": inline},
    ):
        assert load(folder, reference)[1] == data, reference


def test_paths_begin_at_the_json_where_no_folder_is_given(folder, tmp_path):
    assert load(None, "imgs/coco/0.jpg", tmp_path / "a.json")[1] == encoded("JPEG", 0)
    kind, sentence = refusal(None, "../x.jpg", tmp_path / "a.json")
    assert kind == "image outside the folder" and "give the folder of the images with --images" in sentence
    assert refusal(None, "/etc/hostname", tmp_path / "a.json")[0] == "image outside the folder"


@pytest.mark.parametrize(
    "reference",
    ["../secret.png", "coco/../../secret.png", "/etc/passwd", "file:///etc/passwd", "..", "../imgs2/a.png"],
)
def test_nothing_outside_the_folder_is_read(folder, tmp_path, reference):
    for place in (tmp_path / "secret.png", tmp_path / "imgs2/a.png"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded())
    kind, sentence = refusal(folder, reference)
    assert kind == "image outside the folder" and repr(reference) in sentence and "accepted are paths" in sentence


def test_links_are_the_users_own_and_followed(folder, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a.png").write_bytes(encoded())
    (folder / "far").symlink_to(tmp_path / "far")
    assert load(folder, "far/a.png")[1] == encoded()


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("coco/9.jpg", "image missing", "which the folder"),
        ("coco", "image missing", "which is not a file"),
        ("a\0b.jpg", "image missing", "cannot be read: embedded null byte"),
        ("x" * 5000, "image missing", "File name too long"),
        ("https://a.org/b.jpg", "image is an address", "images are not downloaded, accepted are paths of local files"),
        ("s3://a/b.jpg", "image is an address", "images are not downloaded"),
        ("data:image/png;base64,@@@@", "image unreadable", "is not base64"),
        ("data:image/svg+xml,<svg/>", "image unreadable", "accepted is data:image/...;base64"),
        (b"", "image unreadable", "0 bytes"),
        (b"not an image", "image unreadable", "(12 bytes) cannot be decoded"),
        (encoded()[:200], "image unreadable", "cut short or damaged"),
        (encoded("JPEG")[:300], "image unreadable", "cut short or damaged"),
        ({"bytes": None, "path": None}, "image field", "is an object with the fields bytes, path"),
        (None, "image field", "is null; accepted are a path, bytes, and {bytes, path}"),
        (7, "image field", "is 7"),
        (["a.jpg"], "image field", "is a list of 1"),
    ],
)
def test_wrong_images(folder, reference, kind, words):
    found, sentence = refusal(folder, reference)
    assert found == kind and words in sentence


def test_a_folder_named_too_low_is_recognised(folder):
    assert refusal(folder / "coco", "coco/1.jpg")[1].endswith(
        "coco does not hold, but '1.jpg' is there; give the folder that holds 'coco'"
    )


def test_a_pipe_does_not_block(folder):
    os.mkfifo(folder / "pipe.jpg")
    assert refusal(folder, "pipe.jpg")[0] == "image missing"


def test_large_and_strange_pixels(folder, monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (4, 2000)).save(buffer, "PNG")
    assert "too thin" in refusal(folder, buffer.getvalue())[1]
    monkeypatch.setattr("step3vl.data.importers.pictures.MAX_MEMBER_BYTES", 1000)
    assert "at most 1000 are accepted" in refusal(folder, "coco/0.png")[1]
    buffer = io.BytesIO()
    Image.effect_noise((100, 100), 50).save(buffer, "GIF")
    monkeypatch.setattr("step3vl.data.importers.pictures.MAX_MEMBER_BYTES", len(buffer.getvalue()))
    assert "as PNG" in refusal(folder, buffer.getvalue())[1]
    with pytest.raises(ValueError, match=r"--images .*nowhere: there is no such folder"):
        Pictures(folder / "nowhere")
