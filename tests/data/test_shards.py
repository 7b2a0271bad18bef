"""Shards: repeatable bytes, random access in any process, and hostile members that do nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import webdataset
from PIL import Image

from step3vl.data.shards import SampleError, ShardReader, find_shards, index_shard, write_shards
from tests.data.tars import make, png, raw, row


@pytest.fixture
def shard(tmp_path):
    write_shards((make(k, num_images=k % 3) for k in range(10)), tmp_path, "a", 100)
    return tmp_path / "a-000000.tar"


def test_same_samples_give_the_same_bytes_and_counts(tmp_path):
    infos = [write_shards((make(k, 2) for k in range(7)), tmp_path / name, "x", 3) for name in "ab"]
    assert infos[0] == infos[1]
    assert [(info.file, info.num_samples) for info in infos[0]] == [
        ("x-000000.tar", 3),
        ("x-000001.tar", 3),
        ("x-000002.tar", 1),
    ]
    for info in infos[0]:
        data = (tmp_path / "a" / info.file).read_bytes()
        assert data == (tmp_path / "b" / info.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == info.sha256 and len(data) == info.size_bytes
    assert infos[0][0].num_images == 6 and infos[0][0].num_turns == 3
    assert infos[0][0].num_text_bytes == 3 * (len("<image><image>Question 0?") + len("é0".encode()))
    files = [info.file for info in infos[0]]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(files + [f"{file}.idx.json" for file in files])
    for file in files:
        assert (tmp_path / f"a/{file}.idx.json").read_bytes() == (tmp_path / f"b/{file}.idx.json").read_bytes()


def test_read_gives_back_what_was_written_in_any_order(shard):
    reader = ShardReader(shard)
    assert len(reader) == 10
    for k in (9, 0, 5, 2, 5):
        read, wrote = reader.read(k), make(k, k % 3)
        assert read.id == wrote.id and read.messages == wrote.messages and read.answer == wrote.answer
        assert len(read.images) == k % 3
        for a, b in zip(read.images, wrote.images):
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert reader.key(3) == "s_003" and reader.row(3)["id"] == "s/003"


def test_the_index_agrees_with_tarfile(shard):
    with tarfile.open(shard) as tar:
        expected = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
    index = index_shard(shard)
    found = {f"{key}.{name}": place for key, members in index.samples for name, place in members.items()}
    assert found == expected and index.damage is None and index.broken == {}


def test_plain_webdataset_reads_the_shard(shard):
    keys = [row["__key__"] for row in webdataset.WebDataset(str(shard), shardshuffle=False)]
    assert keys == [f"s_{k:03d}" for k in range(10)]


def test_jpeg_images_are_stored_as_jpeg(tmp_path):
    buffer = io.BytesIO()
    smooth = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
    smooth.save(buffer, "JPEG", quality=60)
    sample = make(1)
    sample.images = [Image.open(buffer)]
    write_shards([sample], tmp_path, "j", 1)
    reader = ShardReader(tmp_path / "j-000000.tar")
    assert list(reader.index.samples[0][1]) == ["0.jpg", "json"]
    difference = np.asarray(reader.read(0).images[0]).astype(int) - np.asarray(sample.images[0].convert("RGB"))
    assert np.abs(difference).max() <= 3


def test_writer_refuses_double_keys_bad_stems_and_broken_samples(tmp_path):
    with pytest.raises(ValueError, match="two samples have the key 's_001'"):
        write_shards([make(1), make(1)], tmp_path, "a", 10)
    with pytest.raises(ValueError, match="plain file name"):
        write_shards([make(1)], tmp_path, "../a", 10)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        write_shards([make(1)], tmp_path, "a", 0)
    wrong = make(1)
    wrong.images = []
    with pytest.raises(ValueError, match="1 <image> marks for 0 images"):
        write_shards([wrong], tmp_path, "a", 10)
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left


def _read_ids(reader, numbers):
    return [reader.read(k).id for k in numbers]


def test_reader_travels_to_other_processes(shard):
    reader = ShardReader(shard)
    reader.read(0)  # an open handle must not travel
    assert pickle.loads(pickle.dumps(reader)).read(4).id == "s/004"
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        jobs = [pool.submit(_read_ids, reader, [k, 9 - k]) for k in range(10)]
        assert [job.result() for job in jobs] == [[f"s/{k:03d}", f"s/{9 - k:03d}"] for k in range(10)]


def _child_reads(reader, pipe):
    ids = [reader.read(k).id for k in range(10)]
    os.write(pipe, json.dumps(ids).encode())
    os._exit(0)


def test_a_forked_worker_does_not_share_the_file_position(shard):
    reader = ShardReader(shard)
    reader.read(0)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _child_reads(reader, write_end)
    mine = [reader.read(k).id for _ in range(20) for k in range(10)]
    assert mine == [f"s/{k:03d}" for k in range(10)] * 20
    os.waitpid(child, 0)
    assert json.loads(os.read(read_end, 10000)) == [f"s/{k:03d}" for k in range(10)]


# ------------------------------------------------------------------------------------------------ hostile shards


def test_pickles_links_and_paths_do_nothing(tmp_path):
    marker = tmp_path / "ran"
    bomb = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    path = raw(tmp_path / "h.tar", {"p.json": row([]), "p.pkl": bomb, "../../up.json": row([])})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("l.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    reader = ShardReader(path)
    assert [sample.id for sample in reader] == ["x"]
    assert reader.key(0) == "../../up"  # a name, never opened
    assert reader.index.broken["l"] == "member '.json' is a link or a device, not a file"
    assert "not listed" in reader.index.broken["p"]
    assert not marker.exists()


def test_members_above_the_cap_are_broken_not_read(tmp_path, monkeypatch):
    path = raw(tmp_path / "big.tar", {"a.json": row(["0.png"]), "a.0.png": png(), "b.json": row([])})
    monkeypatch.setattr("step3vl.data.tar_walk.MAX_MEMBER_BYTES", 60)
    assert "at most 60 are accepted" in index_shard(path).broken["a"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_images_name_shard_key_and_reason(tmp_path):
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0))
    huge += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    jpeg = io.BytesIO()
    Image.new("RGB", (4, 4)).save(jpeg, "JPEG")
    bad = {"cut": png(64, 64)[:60], "text": b"hello", "huge": huge, "other": jpeg.getvalue()}
    members = {
        f"{key}.{name}": data
        for key, image in bad.items()
        for name, data in (("json", row(["0.png"])), ("0.png", image))
    }
    reader = ShardReader(raw(tmp_path / "bad.tar", members))
    for k, key in enumerate(bad):
        with pytest.raises(SampleError, match=rf"bad.tar:{key}: image '0.png' cannot be decoded") as error:
            reader.read(k)
        if key == "huge":
            assert "13000x13000 is above the limit" in str(error.value)


def test_rows_that_break_the_schema_are_sample_errors(tmp_path):
    members = {"a.json": row([], level=9), "b.json": b"[" * 100_000}
    reader = ShardReader(raw(tmp_path / "r.tar", members))
    with pytest.raises(SampleError, match=r"r.tar:a: field 'level'"):
        reader.read(0)
    assert list(reader.index.broken) == ["b"]


# ------------------------------------------------------------------------------------------------ finding


def test_find_shards(shard, tmp_path):
    (tmp_path / "sub").mkdir()
    write_shards([make(1)], tmp_path / "sub", "b", 1)
    assert find_shards(tmp_path) == [shard]
    assert find_shards(str(tmp_path / "*.tar")) == [shard]
    assert find_shards(tmp_path / "**" / "*.tar") == [shard, tmp_path / "sub" / "b-000000.tar"]
    with pytest.raises(
        ValueError, match=r"no shards match '.*c-\*.tar'; the folder .* holds a-000000.tar, a-.*json, sub/"
    ):
        find_shards(tmp_path / "c-*.tar")
    with pytest.raises(ValueError, match="does not exist"):
        find_shards(tmp_path / "nowhere" / "*.tar")
    marker = tmp_path / "piped"
    with pytest.raises(ValueError, match="no shards match"):
        find_shards(f"pipe:touch {marker}")
    assert not marker.exists()
