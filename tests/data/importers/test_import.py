"""Whole imports: what lies in the shards afterwards, what is counted, and that nothing is lost silently."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from step3vl.cli import main
from step3vl.data.importers.build import IDS_CHANGED, IDS_MADE, MARKS_ADDED, Labels
from step3vl.data.importers.run import import_source
from step3vl.data.importers.sources import Options, detect
from step3vl.data.processor import Processor
from step3vl.data.shards import ShardReader, find_shards, write_shards
from step3vl.types import IGNORE_INDEX, ImageSpec, Message, MultiCrop, Sample
from tests.data.importers.drawn import LABELS, encoded, llava, messages, pictures, turns, write_json, write_lines

TINY = ImageSpec(4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), MultiCrop(global_size=64, crop_size=48, max_side=288, min_side=8))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pictures in imgs/, as the current one."""
    pictures(tmp_path / "imgs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(place, **changes) -> Options:
    return Options(images=place / "imgs", **changes)


def imported(place, source, out="out", **changes):
    report, _, _ = import_source(source, place / out, LABELS, options(place, **changes))
    shards = find_shards(place / out) if report.num_sound else []
    return report, [sample for shard in shards for sample in ShardReader(shard)]


def rejected(place, out="out"):
    return [json.loads(line) for line in (place / out / "rejected.jsonl").read_text().splitlines()]


def qwen(number: int) -> dict:
    picture = {"type": "image", "image": f"coco/{number}.png"}
    rows = messages("", f"A{number}.")
    rows[0]["content"] = [picture, {"type": "text", "text": "\nWhat?"}]
    return {"id": f"r{number}", "messages": rows}


DIALECTS = {
    "llava": lambda k: llava(k, image=f"coco/{k}.png"),
    "sharegpt": lambda k: {
        "id": f"r{k}",
        "images": [f"coco/{k}.png"],
        "messages": messages("<image>\nWhat?", f"A{k}."),
    },
    "qwenvl": qwen,
    "parquet": lambda k: {"id": f"r{k}", "image": f"coco/{k}.png", "question": "<image>\nWhat?", "answer": f"A{k}."},
}


@pytest.mark.parametrize("format", DIALECTS)
@pytest.mark.parametrize("write", [write_json, write_lines])
def test_every_dialect_gives_the_same_samples_and_they_encode(place, format, write):
    source = write(place / "a.json", [DIALECTS[format](k) for k in range(3)])
    assert detect(source, {}) == format
    report, samples = imported(place, source)
    assert (report.num_sound, report.num_refused, report.notes) == (3, 0, {})
    assert not (place / "out/rejected.jsonl").exists()
    processor = Processor().bind(TINY, lambda patches: (patches + 3) // 4)
    for k, sample in enumerate(samples):
        assert (sample.id, sample.domain, sample.subset, sample.level) == (f"r{k}", "vqa", "mine", 0)
        assert (sample.source, sample.licence, sample.answer) == ("me", "CC0-1.0", None)
        assert [m.content for m in sample.messages] == ["<image>\nWhat?", f"A{k}."]
        assert np.array_equal(np.asarray(sample.images[0]), np.asarray(Image.open(f"imgs/coco/{k}.png")))
        example = processor.encode(sample)
        assert example.num_visual_tokens == 16 and len(example.views) == 1
        learnt = example.labels[example.labels != IGNORE_INDEX].tolist()
        assert processor.tokenizer.decode(learnt, skip_special=False) == f"A{k}.<|im_end|>"


def test_the_same_input_gives_the_same_bytes(place):
    records = [llava(k) for k in range(7)] + [llava(image="no.jpg"), llava(0), {"conversations": turns("q", "a")}]
    source = write_lines(place / "a.jsonl", records)
    for out in "ab":
        import_source(source, place / out, LABELS, options(place), samples_per_shard=4)
    names = sorted(path.name for path in (place / "a").iterdir())
    shards = [f"vqa-mine-level0-00000{k}.tar{end}" for k in range(3) for end in ("", ".idx.json")]
    assert names == ["import.json", "rejected.jsonl", *shards]
    for name in names:
        assert (place / "a" / name).read_bytes() == (place / "b" / name).read_bytes(), name


def test_stored_images_are_the_files_themselves(place):
    images = [f"coco/{k}.{extension}" for k, extension in enumerate(("jpg", "webp", "gif"))]
    imported(place, write_json(place / "a.json", [llava(image=images, conversations=turns("q", "a"))]))
    shard = (place / "out/vqa-mine-level0-000000.tar").read_bytes()
    assert encoded("JPEG", 0) in shard and encoded("WEBP", 1) in shard and encoded("GIF", 2) not in shard
    assert ShardReader(place / "out/vqa-mine-level0-000000.tar").row(0)["images"] == ["0.jpg", "1.webp", "2.png"]


def test_a_file_that_a_shard_cannot_hold_is_not_written(place):
    sample = Sample(id="a", domain="d", subset="s", level=0, images=[Image.new("RGB", (4, 4))], messages=[])
    sample.messages = [Message(role="user", content="<image>q"), Message(role="assistant", content="a")]
    with pytest.raises(ValueError, match="image files must be PNG, JPEG or WebP, found"):
        write_shards([(sample, [encoded("GIF")])], place / "out", "s", 10)
    assert not list((place / "out").iterdir())


def test_orientation_survives(place):
    exif = Image.Exif()
    exif[0x0112] = 6
    (place / "imgs/turned.jpg").write_bytes(encoded("JPEG", 0, exif=exif))
    _, samples = imported(place, write_json(place / "a.json", [llava(image="turned.jpg")]))
    assert samples[0].images[0].size == (24, 32)


def test_marks_are_added_only_where_there_are_none(place):
    system = [{"from": "system", "value": "s"}]
    records = [
        llava(image=["coco/0.jpg", "coco/1.jpg"], conversations=system + turns("q", "a", "q2", "a2")),
        llava(image=["coco/0.jpg", "coco/1.jpg"], conversations=turns("<image>q", "a", "q2", "a2")),
        llava(image=..., conversations=turns("<image>q", "a")),
        llava(image="coco/0.jpg", conversations=turns("<image>q<image>", "a")),
    ]
    report, samples = imported(place, write_json(place / "a.json", records, indent=1))
    assert report.notes[MARKS_ADDED] == 1 and [m.content for m in samples[0].messages][:2] == ["s", "<image><image>q"]
    reasons = [row["reason"] for row in rejected(place)]
    for reason, counts in zip(
        reasons, ("1 <image> mark for 2 images", "1 <image> mark for 0", "2 <image> marks for 1")
    ):
        assert counts in reason and "accepted are as many marks as images, or no marks at all" in reason


def test_ids_are_made_and_made_unique(place):
    ids = ["a/b", "a_b", "a/b", 7, 7.5, None, "", "x" * 200, "x" * 200 + "y"]
    records = [{"id": id, "conversations": turns("q", "a")} for id in ids] + [{"conversations": turns("q", "a")}]
    report, samples = imported(place, write_lines(place / "my data.jsonl", records))
    found = [sample.id for sample in samples]
    made = ["my_data-line6", "my_data-line7"]
    long = "x" * 200, "x" * 74 + "-line9"
    assert found == ["a/b", "a_b-line2", "a/b-line3", "7", "7.5", *made, *long, "my_data-line10"]
    assert report.notes[IDS_MADE] == 3 and report.notes[IDS_CHANGED] == 3


def test_ids_stay_unique_over_files_and_shards(place):
    (place / "many").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(place / "many" / name, [{"id": "same", "conversations": turns("q", "a")}] * 3)
    _, samples = imported(place, place / "many")
    assert [sample.id for sample in samples] == [
        "same",
        *("same-file0-line2", "same-file0-line3"),
        *("same-file1-line1", "same-file1-line2", "same-file1-line3"),
    ]


def test_everything_refused_is_in_rejected_jsonl_and_counted(place):
    records = [
        llava(0),
        llava(image="coco/9.jpg"),
        llava(image="../../etc/x.jpg"),
        {"id": [1], "conversations": turns("q", "a")},
        {"conversations": turns("q", "half \ud800")},
        {"conversations": turns("q", "a"), "image_path": "coco/0.jpg"},
        [llava(0), llava(1)],
        "text",
    ]
    report, samples = imported(place, write_json(place / "a.json", records, indent=1))
    rows = rejected(place)
    assert (report.num_sound, report.num_refused, len(samples), len(rows)) == (1, 7, 1, 7)
    lines = (place / "a.json").read_text().split("\n")
    starts = [k for k, line in enumerate(lines, 1) if re.match(r' [{\["]', line)][1:]
    assert [row["line"] for row in rows] == starts and all(row["file"] == str(place / "a.json") for row in rows)
    assert [row["kind"] for row in rows] == [
        "image missing",
        "image outside the folder",
        "id of the wrong type",
        "not UTF-8",
        "image in another field",
        "not an object",
        "not an object",
    ]
    assert "give --map image=image_path" in rows[4]["reason"] and "packed records" in rows[5]["reason"]
    about = json.loads((place / "out/import.json").read_text())
    assert about["num_imported"] == 1 and about["num_refused"] == 7 and about["refused"]["not an object"] == 2
    assert about["shards"][0]["num_samples"] == 1


def test_fields_that_are_left_out_are_counted(place):
    records = [llava(k, model="gpt-4", score=None, **({"extra": 1} if k else {})) for k in range(3)]
    report, _ = imported(place, write_json(place / "a.json", records))
    assert report.notes == {"field not imported: model": 3, "field not imported: extra": 2}


def test_mapping(place):
    records = [{"img": "coco/0.jpg", "prompt": "q", "label": 5, "question": "not this one"}]
    mapping = {"image": "img", "question": "prompt", "answer": "label"}
    report, samples = imported(place, write_json(place / "a.json", records), mapping=mapping)
    assert [m.content for m in samples[0].messages] == ["<image>q", "5"] and len(samples[0].images) == 1
    report, _ = imported(place, write_json(place / "b.json", [llava(0)]), "b", mapping={"system": "sistem"})
    assert report.num_sound == 1 and report.remarks == ["no record has the field 'sistem' of --map"]


def test_limit(place):
    source = write_lines(place / "a.jsonl", [llava(image="no.jpg"), *[llava(k) for k in range(9)]])
    report, samples = imported(place, source, limit=3)
    assert (report.num_sound, report.num_refused, len(samples)) == (2, 1, 2)


def test_a_cut_file_gives_what_precedes_and_says_so(place):
    source = write_json(place / "a.json", [llava(k) for k in range(5)], indent=1)
    source.write_text(source.read_text()[:-20])
    report, samples = imported(place, source)
    assert len(samples) == 4 and report.num_refused == 1
    assert report.remarks == [f"{source} was not read past line {rejected(place)[0]['line']}"]


def test_a_second_file_that_is_no_source_is_a_refusal(place):
    (place / "many").mkdir()
    write_lines(place / "many/a.jsonl", [llava(0)])
    (place / "many/b.jsonl").write_bytes(b"\x1f\x8b rest")
    report, samples = imported(place, place / "many")
    assert len(samples) == 1 and report.kinds == {"file unreadable": 1}
    assert "b.jsonl is packed with gzip; unpack it first" in rejected(place)[0]["reason"]


def test_an_import_where_all_is_refused_stops_early(place, monkeypatch):
    monkeypatch.setattr("step3vl.data.importers.run.ENOUGH", 10)
    source = write_lines(place / "a.jsonl", [llava(image="no.jpg")] * 50)
    report, samples = imported(place, source)
    assert not samples and report.num_refused == 10
    assert report.remarks == ["stopped early, because the first 10 were all refused"]


def test_a_folder_of_another_import_is_not_touched_unless_asked(place):
    source = write_lines(place / "a.jsonl", [llava(k) for k in range(5)])
    import_source(source, place / "out", LABELS, options(place), samples_per_shard=1)
    assert all(shard.with_name(f"{shard.name}.idx.json").exists() for shard in find_shards(place / "out"))
    with pytest.raises(ValueError, match=r"already holds vqa-mine-level0-000000\.tar; each import has a folder"):
        import_source(source, place / "out", LABELS, options(place))
    other = Labels(domain="gui", subset="b", source="me")
    (place / "out/notes.txt").write_text("mine")
    import_source(source, place / "out", other, options(place), overwrite=True)
    names = sorted(path.name for path in (place / "out").iterdir())
    assert names == ["gui-b-level0-000000.tar", "gui-b-level0-000000.tar.idx.json", "import.json", "notes.txt"]
    (place / "out/foreign.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds foreign\.tar, which no import wrote"):
        import_source(source, place / "out", other, options(place), overwrite=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domain": "a/b"}, "--domain 'a/b': accepted are letters"),
        ({"subset": ""}, "--subset '': accepted are letters"),
        ({"level": 5}, "--level 5: accepted are 0, 1, 2, 3, 4"),
        ({"licence": " "}, "--licence ' ': accepted is printable text"),
        ({"source": "a\udc80"}, "--source 'a\\udc80': accepted is printable"),
    ],
)
def test_labels(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Labels(**{"domain": "vqa", "subset": "s", "source": "me", **changes})


# ------------------------------------------------------------------------------------------------ the command


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["data", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_then_view_stats_and_validate(place, capsys):
    write_json(place / "mine.json", [llava(k) for k in range(4)] + [llava(image="coco/7.jpg")], indent=1)
    words = ("mine.json", "--images", "imgs", "--out", "out", "--domain", "vqa", "--licence", "MIT")
    code, text, _ = run(capsys, "import", *words)
    assert code == 0 and "format llava, domain vqa, subset mine, licence MIT" in text
    assert "which the folder imgs does not hold" in text
    assert text.splitlines()[-1] == "imported 4 of 5 records; 1 refused, see out/rejected.jsonl"
    assert run(capsys, "view", "out/vqa-mine-level0-000000.tar")[0] == 0
    assert Image.open("out/vqa-mine-level0-000000.png").width > 100
    code, text, _ = run(capsys, "stats", "out")
    assert code == 0 and "mine" in text and "0 damaged" in text
    assert run(capsys, "validate", "out")[:2] == (0, "1 shard: 4 samples sound\n")


def test_exit_codes(place, capsys):
    write_lines(place / "bad.jsonl", [llava(image="no.jpg")])
    code, text, _ = run(capsys, "import", "bad.jsonl", "--images", "imgs", "--out", "out", "--domain", "vqa")
    assert code == 1 and text.splitlines()[-1] == "imported 0 of 1 records; 1 refused, see out/rejected.jsonl"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("nowhere.json",), "nowhere.json: there is no such file or folder"),
        (("imgs",), "imgs holds no .json, .jsonl, .ndjson, .parquet files; it holds coco/"),
        (("imgs/coco/0.jpg",), "accepted are a JSON array of records, one JSON record a line, and parquet"),
        (("a.json", "--format", "lava"), "--format lava: accepted are auto, llava, sharegpt, qwenvl, parquet"),
        (("a.json", "--images", "nowhere"), "--images nowhere: there is no such folder"),
        (("a.json", "--map", "question"), "--map question: accepted is OURS=THEIRS"),
        (("a.json", "--map", "qestion=x"), "'qestion' is none of id, image, images, system"),
        (("a.json", "--map", "id=x", "--map", "id=y"), "--map id=y: 'id' is already in another --map"),
        (("a.json", "--limit", "0"), "--limit must be at least 1"),
        (("a.json", "--samples_per_shard", "0"), "--samples_per_shard must be at least 1"),
        (("a.json", "--out", "a.json"), "--out a.json is a file; accepted is a folder"),
        (("odd.json",), "the fields of the first record fit no format: prompt, label; needed are conversations"),
        (("packed.json",), "no record can be read: its first record is a list of 1, not an object"),
        (("wrapped.json",), "the records lie in the field 'data'; accepted is that array alone"),
        (("empty.json",), "no record can be read: it holds no records"),
        (("both",), "both holds JSON and parquet files; name one kind, for example 'both/*.parquet'"),
    ],
)
def test_a_mistake_is_one_sentence(place, capsys, words, expected):
    write_json(place / "a.json", [llava(0)])
    write_json(place / "odd.json", [{"prompt": "q", "label": "a"}])
    write_json(place / "packed.json", [[llava(0)]])
    (place / "wrapped.json").write_text(json.dumps({"info": {}, "data": [llava(0)]}))
    write_json(place / "empty.json", [])
    (place / "both").mkdir()
    for name in ("a.json", "a.parquet"):
        (place / "both" / name).write_bytes(b"x")
    code, _, error = run(capsys, "import", "--out", "out", "--domain", "vqa", *words)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert expected in error
    assert not (place / "out").exists()


@pytest.mark.parametrize("write", [write_json, write_lines])
def test_every_cut_of_a_source_is_a_problem_and_never_a_traceback(place, capsys, write):
    whole = write(place / "whole.json", [llava(k) for k in range(2)]).read_bytes()
    for size in range(0, len(whole) - 1, 7):
        (place / "cut.json").write_bytes(whole[:size])
        code, text, error = run(capsys, "validate", "cut.json", "--images", "imgs")
        sentence = error if code == 2 else text.splitlines()[-1]
        assert code == 2 or "1 problem" in sentence or "1 of 1 records sound" in sentence, (size, text, error)
        assert "Traceback" not in text + error and error.count("\n") == (code == 2)
