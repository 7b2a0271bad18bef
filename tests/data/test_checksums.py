"""Checksums of samples: nothing half and nothing altered is ever passed on, nothing sound is lost, all is counted (R8).

A shard gets its checksums when it is written here, or when it is first indexed. What was altered before a shard was
first indexed cannot be known, unless the image or the JSON no longer parses.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from step3vl.data import Mixture, Processor, Source
from step3vl.data.loader import PackedBatches
from step3vl.data.plan import SamplePlan
from step3vl.data.shards import AlteredError, ShardError, ShardReader, find_shards, index_shard, write_shards
from step3vl.data.sizes import cache_file, measure_shards, shard_sizes
from step3vl.data.tar_index import VERSION, ShardIndex, index_file
from step3vl.data.validate import validate_shards
from step3vl.types import ImageSpec, MultiCrop
from tests.data.damages import HEADER, IMAGE, JSON, KINDS, damage
from tests.data.tars import make, png, raw, row

SPEC = ImageSpec(4, (0.5,) * 3, (0.5,) * 3, MultiCrop(global_size=64, crop_size=48, max_side=288, min_side=8))
NUM_SHARDS, PER_SHARD = 4, 12
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(template="plain").bind(SPEC, lambda side: -(-side // 4))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Four shards of twelve samples with one or two images."""
    folder = tmp_path_factory.mktemp("sound")
    write_shards((make(k, 1 + k % 2) for k in range(NUM_SHARDS * PER_SHARD)), folder, "s", PER_SHARD)
    return folder


@pytest.fixture
def shard(tmp_path) -> Path:
    write_shards((make(k, 1 + k % 2) for k in range(PER_SHARD)), tmp_path, "s", PER_SHARD)
    return tmp_path / "s-000000.tar"


def stored(path: Path, index: ShardIndex) -> dict[str, dict[str, bytes]]:
    """Members of each sample, read by offset alone."""
    data = path.read_bytes()
    return {key: {name: data[a : a + n] for name, (a, n) in members.items()} for key, members in index.samples}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def readable(path: Path) -> list[str]:
    """Keys that can be read."""
    reader, keys = ShardReader(path, strict=False), []
    for i in range(len(reader)):
        try:
            reader.read(i)
            keys.append(reader.key(i))
        except AlteredError as error:
            assert f"{path}:{reader.key(i)}: " in str(error)
    return keys


# ------------------------------------------------------------------------------------------------ every kind of damage


class Damaged:
    """A copy of the sound shards of which two are damaged, and all that a run makes of it in one epoch."""

    def __init__(self, sound: Path, folder: Path, processor: Processor, kind: str, seed: int, is_indexed: bool):
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        paths = sorted(folder.glob("*.tar"))
        indices = {path: index_shard(path) for path in paths}
        self.before = {path: stored(path, indices[path]) for path in paths}
        self.places = {key: min(m.values())[0] for index in indices.values() for key, m in index.samples}
        self.hurt = [paths[k] for k in (seed % NUM_SHARDS, (seed + 1 + seed // NUM_SHARDS % 3) % NUM_SHARDS)]
        for k, path in enumerate(self.hurt):
            damage(kind, path, indices[path], 2 * seed + k)
        if not is_indexed:
            for path in paths:
                index_file(path).unlink()
        self.originals = {key: members for shard in self.before.values() for key, members in shard.items()}

        mixture = Mixture(folder, {"s": Source("s-*.tar", 1.0)}, seed)
        step = next(SamplePlan(mixture, mixture.num_samples("s")))
        self.batch = PackedBatches(mixture, processor, 512)[step]
        self.skipped = [line.split(": ")[0].removeprefix("s/") for line in self.batch.skipped]
        self.delivered: dict[str, dict[str, bytes]] = {}
        for reader, i in map(mixture.place, step.rows[0]):
            if (key := reader.key(i)) not in self.skipped:
                assert key not in self.delivered, "twice"
                self.delivered[key] = reader.members(i)
        assert len(self.delivered) == len(self.batch.sample_ids)
        assert len(set(self.skipped)) == len(self.skipped)
        for key, members in self.delivered.items():
            assert members.keys() == self.originals[key].keys(), "half a sample"
        self.said = {path: [line for line in mixture.warnings if f"{path.name}:" in line] for path in paths}
        assert all(not lines for path, lines in self.said.items() if path not in self.hurt)
        assert sum(map(len, self.said.values())) == len(mixture.warnings)

        self.altered: set[str] = set()  # whose bytes in the shard are others now, while its size is the same
        self.gone: dict[Path, int] = {}  # samples that a shard of another size no longer holds
        for path in self.hurt:
            now = stored(path, indices[path]) if path.exists() else {}
            changed = {key for key, members in self.before[path].items() if now.get(key) != members}
            same_size = path.exists() and path.stat().st_size == indices[path].size_bytes
            self.altered |= changed if same_size else set()
            self.gone[path] = 0 if same_size else 1 if kind == "a member left out" else len(changed)

    def lost(self, path: Path) -> set[str]:
        """Samples of a shard that were neither delivered nor skipped."""
        return self.before[path].keys() - self.delivered.keys() - set(self.skipped)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_sound_samples_arrive_and_damaged_ones_are_counted(sound, processor, tmp_path, kind, seed):
    found = Damaged(sound, tmp_path, processor, kind, seed, is_indexed=True)
    assert all(members == found.originals[key] for key, members in found.delivered.items()), "altered"
    assert set(found.skipped) == found.altered
    assert all("bytes differ from their checksum" in line for line in found.batch.skipped)
    for path in found.hurt:
        assert len(found.lost(path)) == found.gone[path] == said_to_be_lost(found.said[path])
    assert len(found.delivered) + len(found.skipped) + sum(found.gone.values()) == NUM_SHARDS * PER_SHARD
    if kind == HEADER:
        assert len(found.delivered) == NUM_SHARDS * PER_SHARD
    if kind in (JSON, IMAGE):
        assert len(found.skipped) == 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_index_only_what_still_parses_can_be_altered(sound, processor, tmp_path, kind, seed):
    found = Damaged(sound, tmp_path, processor, kind, seed, is_indexed=False)
    changed = {key for key, members in found.delivered.items() if members != found.originals[key]}
    assert changed <= found.altered and set(found.skipped) <= found.altered
    for path in found.hurt:
        lost, said = found.lost(path), found.said[path]
        if kind == "missing":  # nothing tells that it was ever there
            assert len(lost) == PER_SHARD and not said
            continue
        if kind == HEADER:
            assert len(lost) == (1 if "tar header at byte" in " ".join(said) else 0)
        elif kind == "garbage":
            assert len(lost) == PER_SHARD
        elif kind in (JSON, IMAGE):
            assert lost <= found.altered
        elif kind == "zeroed blocks":
            assert len(lost) <= 8
            if lost and not said:  # the last sample and all after it: this looks like the end of the archive
                first = min(found.places[key] for key in lost)
                assert not any(path.read_bytes()[first:])
                continue
        else:
            assert len(lost) == found.gone[path]
        assert len(lost) == said_to_be_lost(said, PER_SHARD)


def said_to_be_lost(warnings: list[str], total: int | None = None) -> int:
    """Samples of one shard that these sentences say are lost; `total` where no index could tell how many there were."""
    for line in warnings:
        if found := re.search(r"(\d+) samples are lost; restore it or delete s-\d+\.tar\.idx\.json$", line):
            return int(found[1])
        if found := re.search(r"(\d+) whole samples are left(?: of (\d+))?$", line):
            return int(found[2] or total or found[1]) - int(found[1])
    assert all(re.search(r":s_\d+: .*(\.json|member)", line) for line in warnings), warnings  # one a sample
    return len(warnings)


def test_bits_anywhere_in_a_shard_are_never_passed_on(shard):
    """300 single bits: each is seen, or lies where no sample's bytes are; headers and padding cost nothing."""
    index, whole, rng = index_shard(shard), shard.read_bytes(), random.Random(0)
    ranges = [(key, a, a + n) for key, members in index.samples for a, n in members.values()]
    for _ in range(300):
        at = rng.randrange(len(whole))
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        shard.write_bytes(data)
        hit = {key for key, first, end in ranges if first <= at < end}
        assert set(readable(shard)) == {key for key, _ in index.samples} - hit


# ------------------------------------------------------------------------------------------------ when they are made


def test_they_are_those_of_the_bytes_and_made_without_reading_the_shard_again(shard, monkeypatch):
    index = index_shard(shard)
    for digest, (_, members) in zip(index.checksums, stored(shard, index).items(), strict=True):
        assert digest == xxh3_64_intdigest(b"".join(members.values()))
    kept = json.loads(index_file(shard).read_text())
    assert kept["version"] == VERSION and kept["checksums"] == index.checksums
    monkeypatch.setattr("step3vl.data.tar_index._read", None)  # payloads are not read by the writer
    write_shards((make(k, 1 + k % 2) for k in range(PER_SHARD)), shard.parent, "again", PER_SHARD)
    monkeypatch.undo()
    assert index_shard(shard.with_name("again-000000.tar")).checksums == index.checksums
    index_file(shard).unlink()
    assert index_shard(shard).checksums == index.checksums  # at first indexing


def test_a_copy_keeps_its_index_and_its_measured_sizes(shard, processor, tmp_path):
    assert measure_shards([shard], processor) == 1
    place = tmp_path / "copy"
    place.mkdir()
    for file in shard.parent.glob("s-*"):
        (place / file.name).write_bytes(file.read_bytes())
    copy = place / shard.name
    os.utime(copy, ns=(1, 1))
    kept = index_file(copy).stat().st_mtime_ns
    assert readable(copy) == [f"s_{k:03d}" for k in range(PER_SHARD)]
    assert measure_shards([copy], processor) == 0
    assert index_file(copy).stat().st_mtime_ns == kept


def test_a_cache_without_checksums_is_made_again(shard):
    kept = json.loads(index_file(shard).read_text())
    for change in (
        {"version": 1},
        {"checksums": kept["checksums"][:3]},
        {"checksums": None},
        {"checksums": ["x"] * 12},
    ):
        index_file(shard).write_text(json.dumps(kept | change))
        assert len(index_shard(shard)) == PER_SHARD
        assert json.loads(index_file(shard).read_text()) == kept
    old = {"stamp": [1, shard.stat().st_size, shard.stat().st_mtime_ns], **{k: kept[k] for k in ("samples", "broken")}}
    index_file(shard).write_text(json.dumps(old | {"damage": None}))
    assert len(index_shard(shard)) == PER_SHARD and json.loads(index_file(shard).read_text()) == kept


def test_a_shard_rewritten_on_purpose(shard):
    before, size = index_shard(shard).checksums, shard.stat().st_size
    write_shards((make(k + 100, 1 + k % 2) for k in range(PER_SHARD)), shard.parent, "t", PER_SHARD)
    other = shard.with_name("t-000000.tar")
    data = other.read_bytes()
    shard.write_bytes(data[:size] if len(data) >= size else data + bytes(size - len(data)))  # by hand, of the same size
    reader = ShardReader(shard)
    for i in range(len(reader)):
        with pytest.raises(AlteredError) as error:
            reader.read(i)
        assert str(error.value) == (
            f"{shard}:{reader.key(i)}: its bytes differ from their checksum in s-000000.tar.idx.json; the shard is "
            "damaged, or it was rewritten on purpose: then delete that file"
        )
    index_file(shard).unlink()
    assert readable(shard) and index_shard(shard, strict=False).checksums != before
    write_shards((make(k, 1 + k % 2) for k in range(PER_SHARD)), shard.parent, "s", PER_SHARD)  # ours takes care of it
    assert len(readable(shard)) == PER_SHARD


# ------------------------------------------------------------------------------------------------ damage with an index


def test_what_a_cut_leaves_keeps_its_checksums(shard):
    index = index_shard(shard)
    cut = index.samples[8][1]["json"][0]
    flip(shard, index.samples[2][1]["0.png"][0] + 20)
    shard.write_bytes(shard.read_bytes()[:cut])
    assert readable(shard) == [f"s_{k:03d}" for k in range(8) if k != 2]
    now = index_shard(shard, strict=False)
    assert now.checksums == index.checksums[:8] and now.damage.endswith("8 whole samples are left of 12")


def test_a_damaged_header_in_a_cut_shard_hides_nothing(shard):
    index = index_shard(shard)
    cut = index.samples[8][1]["json"][0]
    for number in (2, 5):
        flip(shard, index.samples[number][1]["json"][0] - 500)
    shard.write_bytes(shard.read_bytes()[:cut])
    assert readable(shard) == [f"s_{k:03d}" for k in range(8)]
    now = index_shard(shard, strict=False)
    assert [key for key, _ in now.samples] == [f"s_{k:03d}" for k in range(8)] and now.checksums == index.checksums[:8]
    assert "(and 2 more)" in now.damage and now.broken.keys() <= {"s_008"}


def test_a_shard_that_was_made_whole_again_is_indexed_again(shard):
    whole = shard.read_bytes()
    index_file(shard).unlink()
    flip(shard, index_shard(shard, strict=False).samples[4][1]["json"][0] - 500)
    index_file(shard).unlink()
    with pytest.raises(ShardError, match="11 whole samples are left"):
        index_shard(shard)
    shard.write_bytes(whole)  # of the same size
    os.utime(shard, ns=(1, 1))
    assert len(index_shard(shard)) == PER_SHARD and len(readable(shard)) == PER_SHARD


def test_sizes_of_altered_samples_are_not_kept(shard, processor):
    at = index_shard(shard).samples[3][1]["json"][0] + 5
    flip(shard, at)
    assert (shard_sizes(shard, processor)["num_tokens"] < 0).tolist() == [k == 3 for k in range(PER_SHARD)]
    assert not cache_file(shard, processor.fingerprint).exists()
    flip(shard, at)
    assert (shard_sizes(shard, processor)["num_tokens"] > 0).all()
    assert cache_file(shard, processor.fingerprint).exists()


def test_a_shard_that_vanishes_under_a_reader_is_a_sentence(shard):
    reader = ShardReader(shard)
    shard.unlink()
    with pytest.raises(AlteredError, match=r"s-000000.tar:s_000: cannot be read \(No such file or directory\)"):
        reader.read(0)
    assert find_shards(shard.parent) == [shard]
    with pytest.raises(ShardError, match=r"\(No such file or directory\); 12 samples are lost; restore it or delete"):
        index_shard(shard, strict=False)
    index_file(shard).unlink()
    with pytest.raises(ValueError, match="no shards match"):
        find_shards(shard.parent)


def test_validate_walks_the_headers_again_and_compares_every_sample(shard):
    from step3vl.data.importers.report import Report

    kept = index_file(shard).read_bytes()
    flip(shard, index_shard(shard).samples[2][1]["0.png"][0] + 20)
    flip(shard, index_shard(shard).samples[5][1]["json"][0] - 500)
    report = Report()
    validate_shards([shard], report)
    assert report.num_sound == PER_SHARD - 1
    assert dict(report.kinds) == {"damaged shard": 1, "altered": 1}
    assert index_file(shard).read_bytes() == kept


def test_a_hostile_header_does_not_send_the_walk_backwards(tmp_path):
    path = raw(tmp_path / "h.tar", {"a.json": row([]), "b.json": row(["0.png"]), "b.0.png": png()})
    data = bytearray(path.read_bytes())
    data[124:136] = b"-0000002000\0"  # a size of -1024 bytes
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    index = index_shard(path, strict=False)
    assert [key for key, _ in index.samples] == ["b"] and "the tar header at byte 0" in index.damage
