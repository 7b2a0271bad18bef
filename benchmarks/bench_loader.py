"""Reading shards of 30 KB samples, sending them to the training process, and decoding them in workers.

Comparisons within one run: our tar reader, which compares checksums, and webdataset, litdata, mosaic streaming (CPU
time, no workers, nothing decoded); two workers that send samples one by one or as packed 8-bit batches (samples/s); two
workers that decode with PIL, with and without freed memory kept (CPU time of fresh processes). Page cache is warm.
Peers that are not installed are left out, with a sentence. Run: make bench
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.gate import abstain, interleaved, ratio
from benchmarks.loader_peers import LitData, Mosaic, installed, receive_lists, rows_of
from step3vl.data.collate import collate
from step3vl.data.malloc import worker_init
from step3vl.data.processor import Processor
from step3vl.data.schema import from_json
from step3vl.data.shards import ShardReader, write_shards
from step3vl.types import Batch, Example, ImageSpec, Message, MultiCrop, Sample
from tests.data.released_views import jpeg, landscape

NUM_SHARDS, SAMPLES_PER_SHARD, SIZE = 4, 250, (512, 384)
NUM_EPOCHS, SAMPLES_PER_BATCH = 4, 40
SPEC = ImageSpec(4, (0.5,) * 3, (0.5,) * 3, MultiCrop(global_size=64, crop_size=48, max_side=96, min_side=8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Four shards of 250 samples, each a JSON member and a JPEG of about 30 KB."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shards")
    files = [jpeg(landscape(SIZE[0], SIZE[1] + k), quality=85) for k in range(25)]
    images = [Image.open(io.BytesIO(data)) for data in files]

    def sample(k: int) -> Sample:
        question, answer = f"<image>What is in picture {k}?", f"Noise number {k % 25}."
        messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
        return Sample(
            id=f"sample-{k}", domain="vqa", subset="landscapes", level=0, messages=messages, images=[images[k % 25]]
        )

    stored = ((sample(k), [files[k % 25]]) for k in range(NUM_SHARDS * SAMPLES_PER_SHARD))
    write_shards(stored, folder, "landscapes", SAMPLES_PER_SHARD)
    return sorted(folder.glob("*.tar"))


@pytest.fixture(scope="module")
def peers(shards, tmp_path_factory) -> dict[str, LitData | Mosaic]:
    """The same samples in the formats of those peers that are installed."""
    found = installed()
    if not found:
        pytest.skip("neither is installed: pip install --no-deps litdata mosaicml-streaming, and what they import")
    return {peer.module: peer(tmp_path_factory.mktemp("peers") / "own", read_ours(shards)) for peer in found}


# ------------------------------------------------------------------------------------------------ reading


def read_ours(shards: list[Path]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for path in shards:
        reader = ShardReader(path)
        for i in range(len(reader)):
            yield reader.key(i), reader.members(i)


def read_webdataset(shards: list[Path]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for found in webdataset.WebDataset([str(path) for path in shards], shardshuffle=False, empty_check=False):
        yield found["__key__"], {name: value for name, value in found.items() if not name.startswith("__")}


READERS = {"webdataset": read_webdataset, "ours": read_ours}


def read_all(name: str, shards: list[Path]) -> int:
    return sum(len(members["json"]) for _, members in READERS[name](shards))


def assert_same_samples(shards: list[Path]) -> None:
    ours, theirs = dict(read_ours(shards)), dict(read_webdataset(shards))
    assert len(ours) == NUM_SHARDS * SAMPLES_PER_SHARD and ours == theirs


@pytest.mark.parametrize("reader", READERS)
def test_read(benchmark, shards, reader):
    assert_same_samples(shards)
    benchmark.group = f"read {NUM_SHARDS * SAMPLES_PER_SHARD:,} samples of 30 KB, no workers, CPU seconds"
    benchmark.pedantic(read_all, args=(reader, shards), rounds=5, warmup_rounds=1)


def test_our_reader_takes_a_quarter_of_webdatasets_cpu(shards):
    assert_same_samples(shards)
    seconds = interleaved({name: lambda name=name: read_all(name, shards) for name in READERS}, rounds=7)
    found = ratio(seconds, "webdataset", "ours", f"CPU to read {NUM_SHARDS * SAMPLES_PER_SHARD:,} samples, no workers")
    abstain(seconds)
    assert found >= 4, f"webdataset / ours = {found:.2f}"


def test_reading_beside_litdata_and_mosaic(shards, peers):
    """CPU to read with checksums, beside peers that read without."""
    wanted = dict(read_ours(shards))
    variants = {"ours": lambda: read_all("ours", shards)}
    for name, peer in peers.items():
        assert dict(rows_of(peer.dataset())) == wanted, name
        variants[name] = lambda peer=peer: sum(len(members["json"]) for _, members in rows_of(peer.dataset()))
    seconds = interleaved(variants)
    for name in peers:
        ratio(seconds, name, "ours", f"CPU to read {len(wanted):,} samples, no workers")


# ------------------------------------------------------------------------------------------------ sending


class Stored(Dataset[dict[str, bytes]]):
    """Samples as they are stored, read by our reader."""

    def __init__(self, shards: list[Path], num_epochs: int = NUM_EPOCHS) -> None:
        self.readers, self.num_epochs = [ShardReader(path) for path in shards], num_epochs

    def __len__(self) -> int:
        return NUM_SHARDS * SAMPLES_PER_SHARD * self.num_epochs

    def __getitem__(self, k: int) -> dict[str, bytes]:
        shard, i = divmod(k % (NUM_SHARDS * SAMPLES_PER_SHARD), SAMPLES_PER_SHARD)
        return self.readers[shard].members(i)


class Encoded(Dataset[Example]):
    """Examples with 8-bit views. They are made once, before the workers start: what is timed is sending them."""

    def __init__(self, shards: list[Path]) -> None:
        processor = Processor().bind(SPEC, lambda side: -(-side // 4))
        self.examples = [
            processor.encode(from_json(json.loads(members["json"]), [small(members["0.jpg"])], key))
            for key, members in read_ours(shards)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, k: int) -> Example:
        return self.examples[k]


class Packed(Dataset[Any]):
    """Another data set's samples in packed batches: a Batch of examples, or one array of all bytes and its lengths."""

    def __init__(self, singles: Dataset) -> None:
        self.singles = singles

    def __len__(self) -> int:
        return len(self.singles) // SAMPLES_PER_BATCH

    def __getitem__(self, k: int) -> Any:
        group = [self.singles[i] for i in range(k * SAMPLES_PER_BATCH, (k + 1) * SAMPLES_PER_BATCH)]
        if isinstance(group[0], Example):
            return collate(group, seq_len=4096)
        files = [data for members in group for data in members.values()]
        return torch.from_numpy(np.frombuffer(bytearray().join(files), np.uint8)), [len(data) for data in files]


def small(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB").resize((96, 72))


def received(item: Any) -> tuple[int, int]:
    """Samples in what arrived, and its bytes of files or of pixels."""
    match item:
        case Batch():
            return len(item.sample_ids), sum(views.numel() for views in item.images.tensors)
        case Example():
            return 1, sum(view.numel() for view in item.views)
        case dict():
            return 1, sum(len(data) for name, data in item.items() if not name.startswith("__"))
        case stored, lengths:
            return len(lengths) // 2, len(stored)


def receive(dataset: Dataset) -> tuple[int, int]:
    """Samples and bytes that arrive from two workers."""
    counts = [received(item) for item in DataLoader(dataset, None, num_workers=2, worker_init_fn=worker_init)]
    return sum(num for num, _ in counts), sum(size for _, size in counts)


@pytest.mark.parametrize("kind", [Encoded, Stored])
def test_packed_batches_arrive_faster_than_single_samples(shards, kind):
    singles = kind(shards)
    variants: dict[str, Callable[[], tuple[int, int]]] = {
        "one by one": lambda: receive(singles),
        "packed": lambda: receive(Packed(singles)),
    }
    if kind is Stored:
        names = [str(path) for path in shards]
        peer = webdataset.WebDataset(names, shardshuffle=False, empty_check=False).repeat(nepochs=NUM_EPOCHS)
        variants["webdataset"] = lambda: receive(peer)
    assert len(singles) % SAMPLES_PER_BATCH == 0
    assert len({run() for run in variants.values()}) == 1, "each must bring as many samples and bytes"
    for one, batch in ((singles[k * SAMPLES_PER_BATCH], Packed(singles)[k]) for k in (0, 5)):
        if isinstance(batch, Batch):
            assert torch.equal(batch.images.unstack()[0], one.views[0])
        else:
            assert batch[0][: batch[1][0]].numpy().tobytes() == next(iter(one.values()))
    seconds = interleaved(variants, clock=time.perf_counter)
    title = f"wall time to receive {len(singles):,} samples ({kind.__name__.lower()}) from two workers"
    found = {name: ratio(seconds, name, "packed", title) for name in variants if name != "packed"}
    abstain(seconds)
    baseline = "webdataset" if kind is Stored else "one by one"
    assert found[baseline] >= 1.5, f"{baseline} / packed = {found[baseline]:.2f}"


def test_packed_batches_beside_litdata_and_mosaic(shards, peers):
    """Wall time until as many samples and bytes have arrived from two workers; the peers send lists of samples."""
    once = Packed(Stored(shards, num_epochs=1))
    variants: dict[str, Callable[[], tuple[int, int]]] = {"packed": lambda: receive(once)}
    for name, peer in peers.items():
        variants[name] = lambda peer=peer: receive_lists(peer.dataset(), SAMPLES_PER_BATCH)
    assert len({run() for run in variants.values()}) == 1, "each must bring as many samples and bytes"
    seconds = interleaved(variants, clock=time.perf_counter)
    for name in peers:
        ratio(
            seconds, name, "packed", f"wall time to receive {NUM_SHARDS * SAMPLES_PER_SHARD:,} samples from two workers"
        )


# ------------------------------------------------------------------------------------------------ decoding


class Decoded(Dataset[int]):
    """Sums over every 64th pixel of JPEG files, decoded by PIL."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return NUM_EPOCHS * len(self.files)

    def __getitem__(self, k: int) -> int:
        return int(np.asarray(Image.open(io.BytesIO(self.files[k % len(self.files)])).convert("RGB"))[::8, ::8].sum())


def decode(shards: list[str], keep: bool) -> None:
    """Runs in a process of its own: prints the CPU seconds of two workers and a digest of what they decoded."""
    files = [members["0.jpg"] for _, members in read_ours([Path(path) for path in shards])]
    loader = DataLoader(Decoded(files), 16, num_workers=2, worker_init_fn=worker_init if keep else None)
    digest = hashlib.sha256(torch.cat(list(loader)).numpy().tobytes()).hexdigest()
    del loader
    times = os.times()
    print(json.dumps([times.children_user + times.children_system, digest]))


def decoded(shards: list[Path], keep: bool, **variables: str) -> tuple[float, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-m", "benchmarks.bench_loader", str(int(keep)), *map(str, shards)]
    done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True, check=True)
    seconds, digest = json.loads(done.stdout)
    return seconds, digest


def test_kept_memory_halves_the_cpu_of_pil_in_workers(shards):
    variables = {"MALLOC_MMAP_THRESHOLD_": "536870912", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
    variants = {
        "by default": lambda: decoded(shards, keep=False),
        "kept by worker_init": lambda: decoded(shards, keep=True),
        "kept by environment": lambda: decoded(shards, keep=False, **variables),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    digests = set()
    for _ in range(5):
        for name, run in variants.items():
            value, digest = run()
            seconds[name].append(value)
            digests.add(digest)
    assert len(digests) == 1, "the pixels must be the same"
    ratio(seconds, "by default", "kept by environment", "CPU of two workers that decode with PIL")
    found = ratio(seconds, "by default", "kept by worker_init", "CPU of two workers that decode with PIL")
    abstain(seconds)
    assert found >= 2, f"by default / kept by worker_init = {found:.2f}"


if __name__ == "__main__":
    decode(sys.argv[2:], keep=sys.argv[1] == "1")
