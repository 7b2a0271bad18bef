"""Damaged data through the real command line: what is whole is used, what is not is counted and shown in a sentence."""

import shutil
from pathlib import Path

import pytest

from step3vl.cli import main
from step3vl.data.shards import index_shard
from step3vl.data.tar_index import index_file

RUN = ["fit", "-c", "experiments/step3vl_10b/1_pretrain_phase1.yaml", "--scale=tiny", "--trainer.max_steps=2"]
ONE = ["--data.sources=null", "--data.sources={digits: {shards: 'train/documents-digits-level0-*.tar', weight: 1}}"]


@pytest.fixture
def shards(workplace, small_corpus):
    """A writable copy of the digits shards, under corpus/ of the current folder."""
    (workplace / "corpus").unlink()
    shutil.copytree(small_corpus, workplace / "corpus", ignore=shutil.ignore_patterns("*.idx.json"))
    for split in ("train", "test"):
        for path in (workplace / "corpus" / split).glob("*.tar"):
            path.chmod(0o644)
    return sorted((workplace / "corpus/train").glob("documents-digits-level0-*.tar"))


def said(capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_a_truncated_shard_gives_what_is_whole(shards, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[: len(data) // 2])
    assert main([*RUN, *ONE, "--data.samples_per_step=4"]) == 0
    text = said(capsys)
    assert "Damaged data" in text and shards[0].name in text
    with pytest.raises(ValueError, match=rf"{shards[0].name}.*\d"):
        index_shard(shards[0])


def test_an_unreadable_image_is_skipped_counted_and_shown(shards, capsys):
    member = next(iter(index_shard(shards[0]).samples[0][1][ext] for ext in ("0.png",)))
    data = bytearray(shards[0].read_bytes())
    data[member[0] + 8 : member[0] + member[1]] = bytes(member[1] - 8)
    shards[0].write_bytes(data)
    index_file(shards[0]).unlink()  # as if the image had never been sound
    assert main([*RUN, *ONE, "--data.samples_per_step=16"]) == 0
    text = said(capsys)
    line = next(line for line in text.splitlines() if line.startswith("skipped sample"))
    assert "digits/" in line and "image" in line, line
    assert "1 sample skipped in all" in text or "2 samples skipped in all" in text


def test_a_wrong_number_of_images_is_skipped_and_both_counts_shown(shards, capsys):
    data = shards[0].read_bytes()
    assert data.count(b"<image>") >= 5
    shards[0].write_bytes(data.replace(b"<image>", b"<imagx>"))  # same length: every mark of the shard is gone
    assert main([*RUN, *ONE, "--data.samples_per_step=16"]) == 0
    lines = [line for line in said(capsys).splitlines() if line.startswith("skipped sample")]
    assert lines and "0" in lines[0] and "1" in lines[0] and "<image>" in lines[0], lines


def test_nothing_usable_stops_with_a_sentence(shards, capsys):
    for path in shards:
        path.write_bytes(b"not a tar")
    assert main([*RUN, *ONE]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no usable sample" in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------ altered later

TWENTY = [
    "--data.sources=null",
    "--data.sources={d: {shards: 'train/documents-digits-level0-00000[01].tar', weight: 1}}",
]
LONG = ["--trainer.max_steps=13", "--data.samples_per_step=20", "--data.num_steps=13"]  # every step is an epoch


def alter(shard, *numbers):
    """One bit of the image of samples that were indexed sound; returns their keys."""
    index, data = index_shard(shard), bytearray(shard.read_bytes())
    for number in numbers:
        start, size = index.samples[number][1]["0.png"]
        data[start + size // 2] ^= 1
    shard.write_bytes(data)
    return [index.samples[number][0] for number in numbers]


def test_a_bit_in_one_image_of_twenty_trains_on(shards, capsys):
    (key,) = alter(shards[1], 3)
    assert main([*RUN, *TWENTY, *LONG, "--trainer.default_root_dir=here"]) == 0
    text = said(capsys)
    assert text.count(f"skipped sample d/{key}: corpus/train/{shards[1].name}:{key}: its bytes differ") == 13
    assert "13 samples skipped in all" in text
    lines = Path("here/skipped-rank0.txt").read_text().splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[f"step {k}", f"d/{key}"] for k in range(13)]


def test_more_than_the_share_stops_with_both_counts_and_the_list(shards, capsys):
    keys = alter(shards[0], 2, 5)
    assert main([*RUN, *TWENTY, *LONG, "--trainer.default_root_dir=here"]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "error: 20 of the 200 samples drawn could not be used, and data.max_skipped_share is 0.05; "
        "they are named in here/skipped-rank*.txt"
    )
    last = [line for line in captured.out.splitlines() if line.startswith("skipped sample")][-5:]
    assert all(any(f"d/{key}: " in line for key in keys) for line in last)
    lines = Path("here/skipped-rank0.txt").read_text().splitlines()
    assert len(lines) == 20 and {line.split(": ")[1] for line in lines} == {f"d/{key}" for key in keys}
    assert main([*RUN, *TWENTY, *LONG, "--trainer.default_root_dir=there", "--data.max_skipped_share=0.1"]) == 0
    assert main([*RUN, *TWENTY, "--data.max_skipped_share=5"]) == 2
    assert "max_skipped_share must lie in 0..1, got 5" in capsys.readouterr().err


@pytest.mark.slow
def test_all_ranks_stop_in_the_same_step(shards):
    """Two processes; one of them drew more of the unusable samples than the other."""
    import os
    import subprocess
    import sys

    alter(shards[0], 2, 5)
    ranks = ["--trainer.devices=2", "--trainer.strategy=strategy/ddp.yaml", "--data.samples_per_step=10"]
    done = subprocess.run(
        [sys.executable, "-m", "step3vl", *RUN, *TWENTY, *LONG, *ranks, "--trainer.default_root_dir=here"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "could not be used" in line]
    assert len(errors) == 2 and all("20 of the 200 samples drawn" in line for line in errors), done.stderr[-3000:]
    lines = [Path(f"here/skipped-rank{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert len(lines[0]) + len(lines[1]) == 20
