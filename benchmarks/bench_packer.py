"""Packing an endless stream of samples into rows of 32,768 tokens: how full the rows are, and samples a second.

Two kinds of data: captions (log-normal, median 180 tokens) and long chains of thought (median 6,600). The peer that
packs streams is next-fit, which closes a row as soon as a sample does not fit; TRL's `pack_dataset` is measured where
it is installed. A packing counts only if no sample is lost, repeated or split. Run: make bench
"""

import gc
import json

import numpy as np
import pytest
from gate import abstain, interleaved, ratio

from step3vl.data.packing import Packer

ROW, NUM = 32_768, 100_000
MEDIANS = {"captions": 180, "long answers": 6_600}


def lengths_of(kind):
    rng = np.random.default_rng(0)
    return rng.lognormal(np.log(MEDIANS[kind]), 0.8, NUM).clip(8, ROW).astype(int).tolist()


def open_rows(lengths):
    """Ours; returns rows, and the packer with what is still open."""
    packer, rows = Packer(ROW), []
    for i, length in enumerate(lengths):
        if closed := packer.add(i, length):
            rows += closed
    return rows, packer


def next_fit(lengths):
    rows, row, room = [], [], ROW
    for i, length in enumerate(lengths):
        if length > room:
            rows.append(row)
            row, room = [], ROW
        row.append(i)
        room -= length
    return rows, row


def fill(rows, lengths):
    return sum(lengths[i] for row in rows for i in row) / (len(rows) * ROW)


@pytest.mark.parametrize("kind", MEDIANS)
def test_packer(benchmark, kind):
    lengths = lengths_of(kind)
    gc.freeze()  # torch's objects would be searched again and again while rows pile up
    rows, packer = open_rows(lengths)
    left = [i for _, _, items in packer.state_dict()["open"] for i in items]
    assert sorted([i for row in rows for i in row] + left) == list(range(NUM))
    assert all(sum(lengths[i] for i in row) <= ROW for row in rows)
    plain = next_fit(lengths)[0]
    benchmark.group = f"packer, {NUM:,} samples, {kind}"
    benchmark.pedantic(open_rows, args=(lengths,), rounds=5, warmup_rounds=1)
    seconds = interleaved({"open rows": lambda: open_rows(lengths), "next-fit": lambda: next_fit(lengths)})
    ratio(seconds, "open rows", "next-fit", f"{kind}: time of next-fit")
    state = len(json.dumps(packer.state_dict()))
    rate = NUM / sorted(seconds["open rows"])[2]
    full, plain_full = fill(rows, lengths), fill(plain, lengths)
    print(f"{kind}: fill {full:.4f} (next-fit {plain_full:.4f}), {rate / 1e6:.2f} M samples/s, state {state} bytes")
    assert full >= 0.98
    assert state < 8192
    abstain(seconds)
    assert seconds and sorted(seconds["open rows"])[2] < 15 * sorted(seconds["next-fit"])[2]


@pytest.mark.parametrize("kind", MEDIANS)
def test_trl(kind):
    """TRL's best-fit-decreasing on the same lengths, where it is installed. It copies tokens: no times are compared."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    lengths = lengths_of(kind)[:20_000]
    data = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    packed = trl.pack_dataset(data, ROW, "bfd")
    ours = fill(open_rows(lengths)[0], lengths)
    print(f"\n{kind}: TRL bfd fill {sum(lengths) / (len(packed) * ROW):.4f}, ours {ours:.4f}")
