"""Parquet from the hub: its schemas of images and turns, damage by row and row group, and life without pyarrow."""

from __future__ import annotations

import json
import random
import sys

import pytest

from step3vl.cli import main
from step3vl.data.importers.parquet import read_parquet
from step3vl.data.importers.run import import_source
from step3vl.data.importers.sources import FIELDS, Options, detect
from step3vl.data.shards import ShardReader, find_shards
from tests.data.importers.drawn import LABELS, encoded, messages, pictures


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow", reason="parquet needs pyarrow: pip install -e '.[parquet]'")


def write(path, rows, row_group_size=2, **schema):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, **schema), path, row_group_size=row_group_size)
    return path


def fine(k: int) -> dict:
    picture = {"bytes": encoded("PNG", k), "path": None}
    return {"images": [picture], "texts": [{"user": f"Q{k}?", "assistant": f"A{k}."}], "source": "s", "rating": k}


def picture(k: int) -> dict:
    return {"bytes": encoded("JPEG", k), "path": f"{k}.jpg"}


def imported(tmp_path, source, **changes):
    report, _, format = import_source(source, tmp_path / "out", LABELS, Options(**changes))
    assert format == "parquet"
    return report, [sample for shard in find_shards(tmp_path / "out") for sample in ShardReader(shard)]


def test_finevision(arrow, tmp_path):
    report, samples = imported(tmp_path, write(tmp_path / "a.parquet", [fine(k) for k in range(5)]))
    assert [sample.id for sample in samples] == [f"a-row{k}" for k in range(5)]
    assert [m.content for m in samples[3].messages] == ["<image>Q3?", "A3."]
    assert samples[3].images[0].size == (32, 27)
    assert report.notes["field not imported: source"] == report.notes["field not imported: rating"] == 5
    assert encoded("PNG", 3) in (tmp_path / "out/vqa-mine-level0-000000.tar").read_bytes()


@pytest.mark.parametrize(
    "columns",
    [
        lambda k: {
            "image": picture(k),
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        lambda k: {"image": picture(k)["bytes"], "messages": messages("q", "a")},
        lambda k: {"images": [picture(k)], "messages": json.dumps(messages("q", "a"))},
        lambda k: {"images": picture(k), "question": "q", "answer": "a"},
        lambda k: {"image": {"bytes": None, "path": f"coco/{k}.jpg"}, "texts": [{"user": "q", "assistant": "a"}]},
        lambda k: {
            "images": [picture(k)],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "q"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "a", "index": None}]},
            ],
        },
    ],
)
def test_schemas_of_the_hub(arrow, tmp_path, columns):
    pictures(tmp_path / "imgs")
    source = write(tmp_path / "a.parquet", [columns(k) for k in range(3)])
    assert detect(source, {}) == "parquet"
    report, samples = imported(tmp_path, source, images=tmp_path / "imgs")
    assert report.num_refused == 0 and len(samples) == 3
    for k, sample in enumerate(samples):
        assert [m.content for m in sample.messages] == ["<image>q", "a"]
        assert sample.images[0].size == (32, 24 + k)


def test_other_names_and_numbers(arrow, tmp_path):
    source = write(tmp_path / "a.parquet", [{"img": picture(k), "prompt": "q", "label": k} for k in range(3)])
    mapping = {"image": "img", "question": "prompt", "answer": "label"}
    report, samples = imported(tmp_path, source, mapping=mapping)
    assert [sample.messages[1].content for sample in samples] == ["0", "1", "2"] and samples[0].images
    assert report.notes["numbers written as text"] == 3
    with pytest.raises(ValueError, match="has no column 'labl' \\(--map\\); its columns are img, prompt, label"):
        import_source(source, tmp_path / "b", LABELS, Options(mapping={"answer": "labl"}))
    with pytest.raises(ValueError, match="fit no format: img, prompt, label; needed are conversations, messages"):
        detect(source, {})


def test_a_picture_in_a_column_nobody_reads_is_refused(arrow, tmp_path):
    rows = [{"picture": picture(0), "question": "q", "answer": "a"}, {"picture": None, "question": "q", "answer": "a"}]
    report, samples = imported(tmp_path, write(tmp_path / "a.parquet", rows))
    assert len(samples) == 1 and report.kinds == {"image in another field": 1}
    assert "give --map image=picture" in report.first["image in another field"]


def test_refusals_name_row_group_and_row(arrow, tmp_path):
    rows = [fine(k) for k in range(5)]
    rows[3]["images"] = [{"bytes": b"no image", "path": None}]
    imported(tmp_path, write(tmp_path / "a.parquet", rows))
    (row,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (row["row_group"], row["row"], row["kind"]) == (1, 3, "image unreadable")
    assert "line" not in row and "field 'images' (8 bytes) cannot be decoded" in row["reason"]


def test_text_that_is_not_utf8_costs_one_row(arrow, tmp_path):
    text = arrow.array([b"q0", b"\xff", b"q2"], arrow.binary()).view(arrow.string())
    table = arrow.table({"question": text, "answer": ["a"] * 3})
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    report, samples = imported(tmp_path, tmp_path / "a.parquet")
    assert [sample.messages[0].content for sample in samples] == ["q0", "q2"] and report.kinds == {"not UTF-8": 1}


def test_a_damaged_row_group_costs_its_rows(arrow, tmp_path):
    source = write(tmp_path / "a.parquet", [fine(k) for k in range(6)])
    import pyarrow.parquet

    column = pyarrow.parquet.read_metadata(source).row_group(1).column(0)
    data = bytearray(source.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    source.write_bytes(bytes(data))
    report, samples = imported(tmp_path, source)
    assert [sample.id for sample in samples] == ["a-row0", "a-row1", "a-row4", "a-row5"]
    assert report.num_refused == 2 and report.kinds == {"file cut short or damaged": 2}
    assert "rows 2 to 3 cannot be read" in report.first["file cut short or damaged"]


def test_every_cut_is_one_sentence(arrow, tmp_path):
    data = write(tmp_path / "a.parquet", [fine(k) for k in range(3)]).read_bytes()
    cut = tmp_path / "cut.parquet"
    for size in [*range(0, len(data) - 1, len(data) // 40), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.parquet cannot be read as parquet") as error:
            list(read_parquet(cut, FIELDS))
        assert "\n" not in str(error.value)


def test_random_damage_never_ends_in_anything_but_sentences(arrow, tmp_path):
    random.seed(0)
    whole = write(tmp_path / "a.parquet", [fine(k) for k in range(4)]).read_bytes()
    source, refused = tmp_path / "b.parquet", 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        source.write_bytes(bytes(data))
        try:
            problems = [raw for raw in read_parquet(source, FIELDS) if raw.problem is not None]
            refused += len(problems)
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_few_rows_at_a_time(arrow, tmp_path, monkeypatch):
    monkeypatch.setattr("step3vl.data.importers.parquet.ROWS_AT_ONCE", 3)
    source = write(tmp_path / "a.parquet", [fine(k % 3) for k in range(17)], row_group_size=8)
    raws = list(read_parquet(source, FIELDS))
    assert [raw.place.row for raw in raws] == list(range(17))
    assert [raw.place.row_group for raw in raws] == [0] * 8 + [1] * 8 + [2]
    assert raws[0].skipped_fields == ("source", "rating") and raws[-1].done == 1.0


def test_the_command_takes_a_folder_of_parts(arrow, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part in range(2):
        write(tmp_path / f"data/train-0000{part}-of-00002.parquet", [fine(k) for k in range(3)])
    assert main(["data", "import", "data/*.parquet", "--out", "out", "--domain", "vqa"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "imported 6 of 6 records" and "subset data" in text
    assert main(["data", "validate", "data"]) == 0


def test_without_pyarrow_one_sentence_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    for words in (["import", "--out", str(tmp_path / "out"), "--domain", "vqa"], ["validate"]):
        assert main(["data", words[0], str(tmp_path / "a.parquet"), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert error == "error: parquet needs pyarrow, which is not installed: pip install -e '.[parquet]'\n"
