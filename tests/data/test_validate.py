"""`step3vl data validate`: shards and sources, with file, line or key, and an exit code that scripts can use."""

from __future__ import annotations

import pytest

from step3vl.cli import main
from step3vl.data.shards import index_shard, write_shards
from tests.data.importers.drawn import encoded, llava, pictures, turns, write_json
from tests.data.tars import make, png, raw, row


def run(capsys, *words) -> tuple[int, list[str]]:
    code = main(["data", "validate", *map(str, words)])
    captured = capsys.readouterr()
    assert not captured.err
    return code, captured.out.splitlines()


@pytest.fixture
def shard(tmp_path):
    write_shards((make(k, num_images=k % 3) for k in range(10)), tmp_path / "data/train", "a", 100)
    return tmp_path / "data/train/a-000000.tar"


def test_sound_shards(shard, tmp_path, capsys):
    write_shards([make(0)], tmp_path / "data/val", "b", 100)
    assert run(capsys, shard) == (0, ["1 shard: 10 samples sound"])
    assert run(capsys, tmp_path / "data") == (0, ["2 shards: 11 samples sound"])


def test_wrong_samples_are_named_by_file_and_key(tmp_path, capsys):
    question = [{"role": "user", "content": "q"}]
    members = {
        "good.json": row([]),
        "level.json": row([], level=7),
        "marks.json": row(["0.png"], messages=[*question, {"role": "assistant", "content": "a"}]),
        "marks.0.png": png(),
        "image.json": row(["0.png"]),
        "image.0.png": encoded()[:200],
        "mute.json": row([], messages=question),
        "lost.json": row(["0.png"]),
    }
    path = raw(tmp_path / "s.tar", members)
    code, lines = run(capsys, path)
    assert code == 1 and lines[-1] == "1 shard: 1 sample sound; 5 problems"
    said = {line.split(":")[1]: line for line in lines if line.startswith(f"{path}:")}
    assert "image member '.0.png' is missing" in said["lost"]
    assert "field 'level' must be one of 0, 1, 2, 3, 4, found 7" in said["level"]
    assert "0 <image> marks for 1 images" in said["marks"] and "image '0.png' cannot be decoded" in said["image"]
    assert "no assistant turn" in said["mute"] and len(said) == 5
    table = "\n".join(lines)
    assert all(kind in table for kind in ("field level", "field messages", "image unreadable", "unusable members"))


@pytest.mark.parametrize("size", [0, 10, 600, 3000, 7000])
def test_damaged_shards(shard, capsys, size):
    shard.write_bytes(shard.read_bytes()[:size])
    code, lines = run(capsys, shard)
    assert code == 1 and lines[-1].endswith("sound; 1 problem") and lines[0].startswith(f"{shard}: ")
    assert "truncated" in lines[0] or "empty" in lines[0]


def test_a_flipped_bit_in_a_header(shard, capsys):
    data = bytearray(shard.read_bytes())
    data[index_shard(shard).samples[4][1]["json"][0] - 400] ^= 1
    shard.write_bytes(bytes(data))
    code, lines = run(capsys, shard)
    assert code == 1 and "checksum" in lines[0] and "damaged shard" in "\n".join(lines)


def test_a_source_is_checked_without_being_written(tmp_path, capsys):
    pictures(tmp_path / "imgs")
    before = sorted(tmp_path.rglob("*"))
    good = write_json(tmp_path / "good.json", [llava(k) for k in range(4)])
    assert run(capsys, good, "--images", tmp_path / "imgs") == (0, ["format llava: 4 of 4 records sound"])
    bad = write_json(tmp_path / "bad.json", [llava(0), llava(image="x.jpg"), llava(conversations=turns("q"))], indent=1)
    code, lines = run(capsys, bad, "--images", tmp_path / "imgs")
    assert code == 1 and lines[-1] == "format llava: 1 of 3 records sound; 2 problems"
    text = bad.read_text().split("\n")
    numbers = [k for k, line in enumerate(text, 1) if line == " {"]
    assert lines[0].startswith(f"{bad}:{numbers[1]}: field 'image' is 'x.jpg', which the folder")
    assert lines[1].startswith(f"{bad}:{numbers[2]}: field 'conversations' ends without an answer")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, good, bad])


def test_twenty_sentences_unless_all_are_asked_for(tmp_path, capsys):
    source = write_json(tmp_path / "a.json", [llava(image=f"{k}.jpg") for k in range(33)], indent=0)
    code, lines = run(capsys, source)
    assert code == 1 and sum(line.startswith(str(source)) for line in lines) == 20
    assert "... and 13 more; --all shows them" in lines and lines[-1].endswith("0 of 33 records sound; 33 problems")
    code, lines = run(capsys, source, "--all")
    assert code == 1 and sum(line.startswith(str(source)) for line in lines) == 33 and "... and" not in "".join(lines)


def test_control_characters_of_hostile_data_do_not_reach_the_terminal(tmp_path, capsys):
    record = {"\x1b[31mred\n": 1, "conversations": [{"fr\x1bom": 1}]}
    source = write_json(tmp_path / "a.json", [llava(image=...), record, {"\x1b]0;x\x07": "y" * 9, "a": "\ud800"}])
    code, lines = run(capsys, source)
    assert code == 1 and "\x1b" not in "".join(lines) and "\\x1b" in "".join(lines)


@pytest.mark.parametrize("name", ["nowhere.tar", "nowhere", "nowhere/*.json"])
def test_nothing_there(tmp_path, capsys, name):
    assert main(["data", "validate", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nowhere" in error and error.count("\n") == 1
