"""Damaged data through the real command line: what is whole is used, what is not is counted and shown in a sentence."""

import shutil

import pytest

from step3vl.cli import main
from step3vl.data.shards import index_shard

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
