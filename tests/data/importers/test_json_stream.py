"""The stream of JSON records: values and line numbers as a whole parse would give them, and damage one by one."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest

from step3vl.data.importers import json_stream
from step3vl.data.importers.json_stream import read_json

RECORDS = [
    {"id": 0, "text": 'quotes " and \\ and \\" }{][ , \n'},
    {"nested": [{"a": [1, [2, {"b": "é\u2028\U0001f600"}]]}], "empty": {}, "none": None},
    {},
    [],
    [{"packed": 1}],
    7,
    -1.5e3,
    "text",
    True,
    None,
]


def read(path):
    return [(raw.place.line, raw.value if raw.problem is None else str(raw.problem)) for raw in read_json(path)]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize("ascii", [True, False])
def test_an_array_gives_its_values_with_their_lines(tmp_path, monkeypatch, indent, chunk, ascii):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    text = "\n\n" + json.dumps(RECORDS, indent=indent, ensure_ascii=ascii) + "\n"
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = read(tmp_path / "a.json")
    assert [value for _, value in found] == RECORDS
    if indent is None:
        assert {line for line, _ in found} == {3}
        return
    lines = text.split("\n")
    assert found[0][0] == 4 and len({line for line, _ in found}) == len(RECORDS)
    for line, value in found:
        assert lines[line - 1].lstrip()[0] == json.dumps(value)[0], (line, value)


def test_lines_give_their_numbers_and_broken_ones_are_single(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\n\n{"a": tru}\n{"a": "\xff"}\n{"a": 2}\n{"a"')
    found = read(path)
    assert found[0] == (2, {"a": 1}) and found[3] == (6, {"a": 2})
    assert found[1] == (4, "the record is not JSON: expecting value at line 4, column 7")
    assert found[2] == (5, "the text is not UTF-8: byte 0xff on line 5")
    assert found[4][0] == 7 and "not JSON" in found[4][1]
    assert len(found) == 5


def test_a_json_file_with_a_record_a_line_and_records_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert read(tmp_path / "a.json") == [(1, {"a": 1}), (2, {"a": 2})]
    (tmp_path / "b.json").write_text('{\n"a": 1\n}\n{\n"a": 2\n}\n')
    assert read(tmp_path / "b.json") == [(1, {"a": 1}), (4, {"a": 2})]


def test_in_an_array_a_broken_record_does_not_take_the_rest_along(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a": oops,\n"b": 2},\n{"a": 3}\n]')
    found = read(path)
    assert [value for _, value in found if isinstance(value, dict)] == [{"a": 1}, {"a": 3}]
    assert found[1] == (3, "the record is not JSON: expecting value at line 3, column 7")
    assert found[2] == (5, {"a": 3})


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n{"b": [1, ', 2, "the file ends inside the record that begins here"),
        ('[{"a": 1},\n{"b": "never closed}', 2, "the file ends inside the record that begins here"),
        ('[{"a": 1}\n', 2, "the file ends before its array is closed"),
        ('[{"a": 1}\n}]', 2, "found '}' where a record should begin"),
        ('[{"a": 1}]\n[{"a": 2}]', 2, "the array ends, but more data follow"),
    ],
)
def test_where_an_array_cannot_be_read_on(tmp_path, text, line, reason):
    (tmp_path / "a.json").write_text(text)
    *good, last = list(read_json(tmp_path / "a.json"))
    assert [raw.value for raw in good] == [{"a": 1}]
    assert last.unread == f"{tmp_path}/a.json was not read past line {last.place.line}"
    assert last.place.line == line - (line == 2 and reason.startswith("the array ends")) and reason in str(last.problem)


def test_every_truncation_ends_with_one_problem_and_keeps_what_precedes(tmp_path):
    text = json.dumps([{"k": k, "t": 'a"b\\'} for k in range(5)], indent=1).encode()
    path = tmp_path / "a.json"
    for size in range(1, len(text)):
        path.write_bytes(text[:size])
        found = list(read_json(path))
        whole = text[:size].count(b"}")
        assert [raw.value for raw in found if raw.problem is None] == [{"k": k, "t": 'a"b\\'} for k in range(whole)]
        assert sum(raw.problem is not None for raw in found) == 1


def test_random_bytes_never_raise_anything_but_a_sentence(tmp_path):
    random.seed(0)
    path = tmp_path / "a.json"
    text = json.dumps(RECORDS * 2, indent=1).encode()
    for _ in range(300):
        data = bytearray(text)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(bytes(data))
        try:
            for raw in read_json(path):
                assert raw.problem is None or "\n" not in str(raw.problem)
        except ValueError as error:
            assert "accepted are" in str(error)


@pytest.mark.parametrize("content", [b"", b"  \n", b"hello", b"\x89PNG"])
def test_what_is_no_json_at_all(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json (begins with|holds nothing).*accepted are"):
        list(read_json(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="cannot be opened"):
        list(read_json(tmp_path / "none.json"))


def test_hostile_depth_and_length(tmp_path, monkeypatch):
    (tmp_path / "deep.json").write_text("[" + '{"a":' * 100_000 + "1" + "}" * 100_000 + ', {"a": 1}]')
    found = read(tmp_path / "deep.json")
    assert found == [(1, "the record is nested too deeply"), (1, {"a": 1})]
    (tmp_path / "digits.jsonl").write_text('{"a": ' + "9" * 10_000 + '}\n{"a": 1}\n')
    found = read(tmp_path / "digits.jsonl")
    assert "not usable JSON" in found[0][1] and found[1] == (2, {"a": 1})
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 100)
    (tmp_path / "long.jsonl").write_text('{"a": "' + "x" * 5000 + '"}\n{"a": 1}\n')
    found = read(tmp_path / "long.jsonl")
    assert "longer than the limit of 1000 bytes" in found[0][1] and found[1] == (2, {"a": 1})
    (tmp_path / "long.json").write_text('[{"a": "' + "x" * 5000 + '"}, {"a": 1}]')
    found = read(tmp_path / "long.json")
    assert len(found) == 1 and "does not end within 1000 bytes" in found[0][1]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    record = json.dumps({"text": "x" * 2000})
    with (tmp_path / name).open("w") as file:
        file.write("[" if name == "a.json" else "")
        for k in range(6_000):
            file.write((", " if k and name == "a.json" else "") + record + ("" if name == "a.json" else "\n"))
        file.write("]" if name == "a.json" else "")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_json(tmp_path / name)) == 6_000  # 12 MB on disk
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()
