"""Planned steps: full rows, shares of tokens, equal work, the same after a restart with any number of ranks."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from step3vl.data import Mixture, Processor, Source
from step3vl.data.loader import PackedBatches
from step3vl.data.plan import RowPlan, SamplePlan, deal
from step3vl.data.shards import write_shards
from step3vl.data.sizes import cache_file, measure_shards, shard_sizes
from step3vl.types import ImageSpec, Message, MultiCrop, Sample

from .test_module import CLIP, picture_sample

TINY = ImageSpec(4, *CLIP, MultiCrop(global_size=64, crop_size=48, max_side=288, min_side=8))
SEQ_LEN = 256
NAMES = ("text", "image")


def text_sample(id: str, length: int) -> Sample:
    messages = [Message(role="user", content="Say it."), Message(role="assistant", content="w7" * length)]
    return Sample(id=id, domain="text", subset="echo", level=0, messages=messages)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    write_shards((text_sample(f"t{i}", rng.randint(2, 60)) for i in range(300)), path, "text", 100)
    sizes = [(64, 64), (64, 64), (40, 64), (100, 60)]
    write_shards(
        (picture_sample(f"i{i}", "1" * rng.randint(1, 9), rng.choice(sizes)) for i in range(200)), path, "image", 99
    )
    return path


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(template="chat").bind(TINY, lambda n: n // 4)


def mixture(root, processor, unit="tokens", weights=(9, 1), seed=1) -> Mixture:
    mixed = Mixture(root, {n: Source(f"{n}-*.tar", w) for n, w in zip(NAMES, weights)}, seed, unit)
    mixed.measure(processor, SEQ_LEN)
    return mixed


def cost(size) -> float:
    return size.num_tokens + 300.0 * size.num_crops + 500.0 * size.num_global_views


def test_sizes_are_what_encoding_gives(root, processor):
    mixed = mixture(root, processor)
    crops = 0
    for name in NAMES:
        for number in range(mixed.num_samples(name)):
            size, (shard, index) = mixed.size((name, number)), mixed.place((name, number))
            example = processor.encode(shard.read(index))
            assert size.num_tokens == len(example.input_ids)
            assert size.num_labels == int((example.labels != -100).sum())
            assert size.num_crops + size.num_global_views == len(example.views)
            crops += size.num_crops
    assert crops > 0


def test_sizes_are_kept_beside_the_shard_and_renewed_with_it(tmp_path, processor):
    write_shards([text_sample("a", 3), text_sample("b", 5)], tmp_path, "s", 10)
    shard = tmp_path / "s-000000.tar"
    assert measure_shards([shard], processor) == 1 and measure_shards([shard], processor) == 0
    first = shard_sizes(shard, processor)["num_tokens"].tolist()
    kept = cache_file(shard, processor.fingerprint)
    assert kept.exists()
    other = Processor(template="plain").bind(TINY, lambda n: n // 4)
    assert shard_sizes(shard, other)["num_tokens"].tolist() != first and kept.exists()
    write_shards([text_sample("a", 30)], tmp_path, "s", 10)
    assert len(shard_sizes(shard, processor)) == 1 and not kept.exists()


def test_sizes_are_measured_by_several_processes_alike(root, processor, tmp_path):
    for part in range(3):
        write_shards([text_sample(f"{part}-{i}", i + 1) for i in range(5)], tmp_path, f"p{part}", 5)
    heard: list[int] = []
    shards = sorted(tmp_path.glob("*.tar"))
    assert measure_shards(shards, processor, 2, heard.append) == 3 and heard == [1, 2, 3]
    several = [shard_sizes(shard, processor).tolist() for shard in shards]
    for file in tmp_path.glob("*.npy"):
        file.unlink()
    assert [shard_sizes(shard, processor).tolist() for shard in shards] == several


@pytest.mark.parametrize("weights", [(9, 1), (1, 1)])
def test_token_shares_hold_in_every_window_of_1000_rows(root, processor, weights):
    mixed = mixture(root, processor, weights=weights)
    plan = RowPlan(mixed, 4, SEQ_LEN)
    rows = [Counter() for _ in range(3000)]
    for r, row in enumerate(row for _ in range(750) for row in next(plan).rows):
        for draw in row:
            rows[r][draw[0]] += mixed.size(draw).num_tokens
    for start in range(0, 2001, 50):
        window = sum(rows[start : start + 1000], Counter())
        assert window["text"] / window.total() == pytest.approx(weights[0] / sum(weights), abs=0.01)
    assert sum(row.total() for row in rows) / (3000 * SEQ_LEN) > 0.95  # a sample is up to half a row here


def test_sample_shares_hold_too(root, processor):
    plan = RowPlan(mixture(root, processor, "samples"), 1, SEQ_LEN)
    names = Counter(name for _ in range(1000) for row in next(plan).rows for name, _ in row)
    assert names["text"] / names.total() == pytest.approx(0.9, abs=0.01)


def test_every_sample_once_an_epoch_and_rows_never_too_long(root, processor):
    mixed = mixture(root, processor, weights=(1, 1))
    plan = RowPlan(mixed, 3, SEQ_LEN, max_views=8)
    seen: list[tuple[str, int]] = []
    for _ in range(200):
        for row in next(plan).rows:
            sizes = [mixed.size(draw) for draw in row]
            assert sum(size.num_tokens for size in sizes) <= SEQ_LEN
            assert sum(size.num_crops + size.num_global_views for size in sizes) <= 8
            seen += row
    assert len(seen) == len(set(seen))
    waiting = [tuple(draw) for _, _, items in plan.packer.state_dict()["open"] for draw in items]
    waiting += [draw for row in plan._ready for draw in row]
    for name, drawn in plan.draws.state_dict()["drawn"].items():
        assert sorted(number for n, number in [*seen, *waiting] if n == name) == list(range(drawn))


@pytest.mark.parametrize("options", [{}, {"cost": cost, "balance_steps": 4}], ids=["plain", "balanced"])
@pytest.mark.parametrize("before", [1, 3, 4, 7])
def test_resume_gives_the_same_steps(root, processor, options, before):
    mixed = mixture(root, processor, weights=(1, 1))
    straight = [
        [next(plan).rows for _ in range(16)] for plan in (RowPlan(mixed, 1, SEQ_LEN, r, 3, **options) for r in range(3))
    ]
    plan = RowPlan(mixed, 1, SEQ_LEN, 0, 3, **options)
    for _ in range(before):
        next(plan)
    state = json.loads(json.dumps(plan.state_dict()))
    assert len(json.dumps(state)) < 4096
    for rank in range(3):
        again = RowPlan(mixed, 1, SEQ_LEN, rank, 3, **options)
        again.load_state_dict(state)
        assert [next(again).rows for _ in range(16 - before)] == straight[rank][before:]


@pytest.mark.parametrize("options", [{}, {"cost": cost, "balance_steps": 4}], ids=["plain", "balanced"])
def test_another_number_of_ranks_neither_loses_nor_repeats_a_row(root, processor, options):
    mixed = mixture(root, processor, weights=(1, 1))
    first = [RowPlan(mixed, 1, SEQ_LEN, rank, 3, **options) for rank in range(3)]
    seen = [row for plan in first for _ in range(5) for row in next(plan).rows]
    state = first[0].state_dict()
    assert all(plan.state_dict() == state for plan in first)
    for num_ranks, per_rank in ((1, 2), (2, 1), (2, 2)):
        rest: list[tuple] = []
        for rank in range(num_ranks):
            plan = RowPlan(mixed, per_rank, SEQ_LEN, rank, num_ranks, **options)
            plan.load_state_dict(state)
            rest += [row for _ in range(20 // num_ranks // per_rank * 4) for row in next(plan).rows]
        found = {draw for row in [*seen, *rest] for draw in row}
        assert sum(len(row) for row in [*seen, *rest]) == len(found)
        straight = RowPlan(mixed, 1, SEQ_LEN)
        reference = {draw for _ in range(60) for row in next(straight).rows for draw in row}
        assert reference <= found


def test_balance_cannot_change_in_mid_run(root, processor):
    mixed = mixture(root, processor)
    with pytest.raises(ValueError, match=r"data\.balance was false in the run to resume"):
        RowPlan(mixed, 1, SEQ_LEN, cost=cost).load_state_dict(RowPlan(mixed, 1, SEQ_LEN).state_dict())


def test_ranks_of_a_step_get_equal_work(root, processor):
    mixed = mixture(root, processor, weights=(1, 1))

    def worst(make) -> float:
        plans = [make(rank) for rank in range(4)]
        ratios = []
        for _ in range(32):
            work = [sum(cost(mixed.size(d)) for row in next(plan).rows for d in row) for plan in plans]
            ratios.append(max(work) / (sum(work) / 4))
        return max(ratios)

    assert worst(lambda r: SamplePlan(mixed, 16, r, 4, cost=cost)) < 1.03
    assert worst(lambda r: RowPlan(mixed, 4, SEQ_LEN, r, 4, cost=cost)) < 1.10
    assert worst(lambda r: RowPlan(mixed, 1, SEQ_LEN, r, 4, cost=cost, balance_steps=16)) < 1.5
    assert worst(lambda r: RowPlan(mixed, 1, SEQ_LEN, r, 4)) > 1.5


def test_balanced_samples_are_the_same_samples(root, processor):
    mixed = mixture(root, processor, "samples")
    plain = [SamplePlan(mixed, 6, rank, 2) for rank in range(2)]
    even = [SamplePlan(mixed, 6, rank, 2, cost=cost) for rank in range(2)]
    for _ in range(10):
        ours, theirs = ([d for plan in plans for row in next(plan).rows for d in row] for plans in (plain, even))
        assert sorted(ours) == sorted(theirs) and len(set(ours)) == 12


def test_what_does_not_fit_is_left_out_and_named_once(root, processor, tmp_path):
    longest = [text_sample(f"l{i}", 400 if i == 2 else 20) for i in range(5)]
    write_shards([*longest, picture_sample("many", "1", (250, 250))], tmp_path, "mix", 10)
    stored = bytearray((tmp_path / "mix-000000.tar").read_bytes())
    at = stored.index(b'"id":"l4"')
    stored[at : at + 9] = b'"id":"  "'
    at = stored.index(b'"level"', at)
    stored[at : at + 7] = b'"lexel"'
    (tmp_path / "mix-000000.tar").write_bytes(bytes(stored))
    mixed = Mixture(tmp_path, {"mix": Source("mix-*.tar", 1.0)}, 0, "tokens")
    mixed.measure(processor, SEQ_LEN)
    plans = [RowPlan(mixed, 1, SEQ_LEN, rank, 2, max_views=3) for rank in range(2)]
    steps = [[next(plan) for plan in plans] for _ in range(2)]
    named = sorted({line for step in steps for line in step[0].skipped})
    assert len(named) == 3
    assert "mix/l2: has" in named[0] and "seq_len is 256" in named[0]
    assert named[1] == "mix/l4: cannot be encoded"
    assert "mix/many: has" in named[2]
    assert not any(step[1].skipped for step in steps)
    with pytest.raises(
        ValueError, match=r"sources.mix: none of its 6 samples can be used with seq_len 8; the shortest has"
    ):
        mixed.measure(processor, 8)


def test_a_planned_row_becomes_a_row_of_the_batch(root, processor):
    mixed = mixture(root, processor, weights=(1, 1))
    step = next(RowPlan(mixed, 3, SEQ_LEN))
    batch = PackedBatches(mixed, processor, SEQ_LEN)[step]
    assert batch.input_ids.shape[0] == 3
    assert batch.sources == [name for row in step.rows for name, _ in row]
    assert batch.num_tokens == [mixed.size(draw).num_tokens for row in step.rows for draw in row]
    assert batch.num_padding == batch.input_ids.numel() - sum(batch.num_tokens)


def test_deal():
    assert deal([5, 1, 1, 5], 2, 2) == [[0, 1], [2, 3]] or deal([5, 1, 1, 5], 2, 2) == [[0, 2], [1, 3]]
    hands = deal([9, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2)
    assert sorted(map(len, hands)) == [1, 9]
    assert all(len(hand) == 3 for hand in deal([9, 9, 9, 1, 1, 1], 2, 3))
    with pytest.raises(ValueError, match="5 costs cannot be dealt to 2 hands of 3"):
        deal([1] * 5, 2, 3)
