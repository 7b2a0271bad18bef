"""The index of a shard: its cache, and an exact account of whatever is damaged."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest

from step3vl.data.shards import ShardError, ShardReader, index_shard, write_shards
from tests.data.tars import make, png, raw, row


@pytest.fixture
def shard(tmp_path):
    write_shards((make(k, num_images=k % 3) for k in range(10)), tmp_path, "a", 100)
    return tmp_path / "a-000000.tar"


def test_cache_is_used_until_the_size_of_the_shard_changes(shard):
    cache = shard.with_name(shard.name + ".idx.json")
    stored = json.loads(cache.read_text())
    stored["samples"], stored["checksums"] = stored["samples"][:2], stored["checksums"][:2]
    cache.write_text(json.dumps(stored))
    assert len(index_shard(shard)) == 2  # the cache is what was read
    os.utime(shard, ns=(1, 1))
    assert len(index_shard(shard)) == 2
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert len(index_shard(shard)) == 10
    cache.write_text("{not json")
    assert len(index_shard(shard)) == 10
    stored = json.loads(cache.read_text())
    stored["samples"][0][1]["json"] = [512, 10**9]  # beyond the file
    cache.write_text(json.dumps(stored))
    assert len(index_shard(shard)) == 10 and index_shard(shard).samples[0][1]["json"][1] < 10**6


def test_a_folder_that_cannot_be_written_is_fine(shard, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "read-only")

    shard.with_name(shard.name + ".idx.json").unlink()
    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert len(index_shard(shard)) == 10
    assert not shard.with_name(shard.name + ".idx.json").exists()


def test_long_names_of_both_tar_dialects(tmp_path):
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"long{dialect}.tar"
        key = "folder/" * 8 + "k" * 60 if dialect == tarfile.USTAR_FORMAT else "k" * 150
        with tarfile.open(path, "w", format=dialect) as tar:
            for name, data in ((f"{key}.json", row(["0.png"])), (f"{key}.0.png", png())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert [found for found, _ in index_shard(path).samples] == [key]
        assert ShardReader(path).read(0).id == "x"


# ------------------------------------------------------------------------------------------------ damage


def damaged(path, message: str, whole: int):
    """Strict raises one sentence with file and count; not strict gives exactly the first whole samples."""
    with pytest.raises(ShardError) as error:
        index_shard(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert f"{whole} whole samples are left of 10" in str(error.value)
    reader = ShardReader(path, strict=False)
    assert [sample.id for sample in reader] == [f"s/{k:03d}" for k in range(whole)]
    assert reader.index.damage == str(error.value)
    with pytest.raises(ShardError):  # also from the cache
        index_shard(path)
    return reader.index


def offsets(path, number: int) -> dict[str, tuple[int, int]]:
    return index_shard(path).samples[number][1]


def test_truncated_inside_a_payload(shard):
    start, size = offsets(shard, 5)["0.png"]
    shard.write_bytes(shard.read_bytes()[: start + size // 2])
    index = damaged(shard, f"truncated at byte {start + size // 2}", 5)
    assert index.broken == {}


def test_truncated_between_the_members_of_a_sample(shard):
    start, _ = offsets(shard, 5)["json"]
    shard.write_bytes(shard.read_bytes()[: start - 512])
    index = damaged(shard, f"truncated at byte {start - 512}: the end-of-archive mark is missing", 5)
    assert index.broken == {"s_005": "no .json member, only .0.png, .1.png"}


def test_truncated_exactly_between_two_samples(shard):
    start, _ = offsets(shard, 6)["json"]
    shard.write_bytes(shard.read_bytes()[: start - 512])
    damaged(shard, "the end-of-archive mark is missing", 6)


@pytest.mark.parametrize("change", ["a bit", "zeroed"])
def test_a_damaged_header_costs_nothing_with_an_index_and_one_sample_without(shard, change):
    cache = shard.with_name(shard.name + ".idx.json")
    start, _ = offsets(shard, 4)["json"]
    data = bytearray(shard.read_bytes())
    data[start - 512 : start] = (
        bytes(512) if change == "zeroed" else bytes([data[start - 512] ^ 1]) + data[start - 511 : start]
    )
    shard.write_bytes(data)
    assert [sample.id for sample in ShardReader(shard)] == [f"s/{k:03d}" for k in range(10)]
    known = index_shard(shard, strict=False, again=True)  # the headers themselves
    assert len(known) == 10 and known.broken == {}
    cache.unlink()
    words = (
        "a zeroed tar header at byte {} with data after it"
        if change == "zeroed"
        else "wrong checksum in the tar header at byte {}"
    )
    assert known.damage == f"{shard}: {words.format(start - 512)}; 10 whole samples are left"
    with pytest.raises(ShardError, match=r"9 whole samples are left$"):
        index_shard(shard)
    reader = ShardReader(shard, strict=False)
    assert [sample.id for sample in reader] == [f"s/{k:03d}" for k in range(10) if k != 4]
    assert reader.index.broken == {"s_004": "no .json member, only .0.png"}


def test_missing_empty_and_garbage_files(tmp_path):
    with pytest.raises(ShardError, match=r"gone.tar: the shard cannot be opened"):
        index_shard(tmp_path / "gone.tar", strict=False)
    (tmp_path / "empty.tar").touch()
    with pytest.raises(ShardError, match=r"empty.tar: the shard is empty"):
        index_shard(tmp_path / "empty.tar", strict=False)
    (tmp_path / "noise.tar").write_bytes(bytes(range(1, 256)) * 20)
    with pytest.raises(ShardError, match="no tar header at byte 0; 0 whole samples"):
        index_shard(tmp_path / "noise.tar")


def test_samples_that_lack_a_member_are_named_and_the_rest_goes_on(tmp_path):
    members = {
        "a.json": row(["0.png"]),
        "a.0.png": png(),
        "b.0.png": png(),
        "c.json": row(["0.png", "1.png"]),
        "c.0.png": png(),
        "d.json": b"{",
        "e.json": row([]),
        "e.7.png": png(),
        "f.json": row(["0.gif"]),
        "f.0.gif": b"GIF89a",
        "g.json": row([]),
    }
    index = index_shard(raw(tmp_path / "x.tar", members))
    assert [key for key, _ in index.samples] == ["a", "g"]
    assert index.damage is None
    assert index.broken == {
        "b": "no .json member, only .0.png",
        "c": "image member '.1.png' is missing",
        "d": "its .json cannot be parsed (JSONDecodeError)",
        "e": "member '.7.png' is not listed in the field 'images'",
        "f": "image member '.0.gif' has no accepted extension (png, jpg, jpeg, webp)",
    }
    assert index_shard(tmp_path / "x.tar").broken == index.broken  # also from the cache
