"""The mixture's order: from the seed alone, exact in weight, each sample once an epoch."""

from __future__ import annotations

import io
import pickle
from collections import Counter

import pytest
from rich.console import Console

from step3vl.data.mixture import Mixture, Source
from step3vl.data.shards import write_shards
from step3vl.types import Message, Sample


def text_sample(id: str) -> Sample:
    messages = [Message(role="user", content="Say it."), Message(role="assistant", content=id)]
    return Sample(id=id, domain="text", subset="echo", level=0, messages=messages)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    for name, count in (("red", 30), ("green", 11), ("blue", 4)):
        write_shards((text_sample(f"{name}{i}") for i in range(count)), path / "train", name, 8)
    return path


def three(root, seed: int = 0) -> Mixture:
    weights = {"red": 5.0, "green": 3.0, "blue": 1.0}
    return Mixture(root, {name: Source(f"train/{name}-*.tar", weight) for name, weight in weights.items()}, seed)


def ids_of(mixture: Mixture, positions) -> list[str]:
    places = [mixture.place(mixture.sample_draw(j)) for j in positions]
    return [shard.key(index) for shard, index in places]


def ids(mixture: Mixture, positions) -> list[str]:
    found = []
    for j in positions:
        name, _ = draw = mixture.sample_draw(j)
        shard, index = mixture.place(draw)
        found.append(shard.read(index).id)
        assert found[-1].startswith(name)
    return found


def test_order_follows_from_the_seed_alone(root):
    a, b = three(root), three(root)
    assert ids(a, range(40)) == ids(b, range(40))
    assert ids(a, [39, 3, 1040, 12]) == [ids(b, [j])[0] for j in (39, 3, 1040, 12)]
    assert ids(pickle.loads(pickle.dumps(a)), range(40)) == ids(b, range(40))
    assert ids(three(root, seed=1), range(40)) != ids(b, range(40))


def test_weights_hold_in_every_thousand(root):
    mixture = three(root)
    for period in (0, 1, 57):
        names = [mixture.sample_draw(j)[0] for j in range(period * 1000, period * 1000 + 1000)]
        assert Counter(names) == {"red": 556, "green": 333, "blue": 111}
        assert names[:40] != sorted(names[:40])
    first, second = ([mixture.sample_draw(p * 1000 + j)[0] for j in range(1000)] for p in (0, 1))
    assert first != second


def test_every_epoch_of_a_source_is_a_permutation(root):
    found = [id for id in ids(three(root), range(3000)) if id.startswith("red")]
    epochs = [found[start : start + 30] for start in range(0, len(found) - 29, 30)]
    assert len(epochs) == 1668 // 30
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_single_source_is_seen_whole_before_it_repeats(root):
    mixture = Mixture(root, {"all": Source("train", 0.2)}, seed=3)
    assert mixture.num_samples("all") == 45
    first, second = (ids_of(mixture, range(e * 45, e * 45 + 45)) for e in (0, 1))
    assert len(set(first)) == len(set(second)) == 45
    assert first != second


def test_table_counts_the_run(root):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(three(root).table(9000))
    text = console.export_text()
    assert "9,000 samples" in text
    row = next(line for line in text.splitlines() if "red" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["red", "4", "30", "55.6%", "5,004", "166.80"]


def test_damage_is_reported_and_the_rest_used(root, tmp_path):
    write_shards((text_sample(f"a{i}") for i in range(20)), tmp_path, "a", 10)
    whole = (tmp_path / "a-000001.tar").read_bytes()
    (tmp_path / "a-000001.tar").write_bytes(whole[:5000])
    (tmp_path / "a-000002.tar").write_bytes(b"")
    mixture = Mixture(tmp_path, {"a": Source("a-*.tar", 1.0)})
    assert 10 < mixture.num_samples("a") < 20
    assert len(set(ids(mixture, range(mixture.num_samples("a"))))) == mixture.num_samples("a")
    text = "\n".join(mixture.warnings)
    assert "a-000001.tar: truncated" in text and "a-000002.tar: the shard is empty" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(mixture.table(10))
    assert "a-000002.tar" in console.export_text()


def test_refusals(root, tmp_path):
    with pytest.raises(ValueError, match="at least one source"):
        Mixture(root, {})
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"sources.red.weight must be above 0, got"):
            Mixture(root, {"red": Source("train/red-*.tar", weight)})
    with pytest.raises(ValueError, match=r"sources.pink: no shards match .*pink-\*.tar.*holds blue-000000.tar"):
        Mixture(root, {"pink": Source("train/pink-*.tar", 1.0)})
    with pytest.raises(ValueError, match=r"sources.blue.weight is 1e-05, 0.001% of the mixture; below 0.1%"):
        Mixture(root, {"red": Source("train/red-*.tar", 1.0), "blue": Source("train/blue-*.tar", 1e-5)})
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sources.x: no usable sample in .*x.tar; .*the shard is empty"):
        Mixture(tmp_path, {"x": Source("x.tar", 1.0)})
    with pytest.raises(ValueError, match="no source 'pink' in this mixture; it has red, green, blue"):
        three(root).num_samples("pink")
    with pytest.raises(ValueError, match="start at 0, got -1"):
        three(root).sample_draw(-1)


def test_a_run_that_repeats_too_often_is_refused(root):
    sources = {"red": Source("train/red-*.tar", 1.0), "blue": Source("train/blue-*.tar", 1.0, max_epochs=3)}
    mixture = Mixture(root, sources)
    mixture.check_repeats(24)  # 12 of blue's 4: three times
    with pytest.raises(
        ValueError, match=r"sources.blue: this run would show its samples 3.25 times and max_epochs is 3"
    ):
        mixture.check_repeats(26)
