"""What the throughput callback prints is what the batches held, over the clock that it saw."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from step3vl.callbacks import Throughput
from step3vl.callbacks.peak import measured_flops
from step3vl.types import IGNORE_INDEX

from ..stages.test_pretrain import run

SECONDS = 0.5  # every look at the clock


class Seen(Callback):
    """Keeps batches, and what was logged after each."""

    def __init__(self):
        self.batches, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def clock(monkeypatch):
    ticks = itertools.count()
    fake = SimpleNamespace(perf_counter=lambda: next(ticks) * SECONDS, process_time=lambda: 0.0)
    monkeypatch.setattr("step3vl.callbacks.throughput.time", fake)
    return ticks


def test_every_figure_follows_from_the_batches(small_corpus, clock):
    seen, throughput = Seen(), Throughput(every_n_steps=2, peak_tflops=0.001)
    stage = run(small_corpus, samples=4, num_steps=4, callbacks=[throughput, seen], log_every_n_steps=1)
    last, batches = seen.logged[3], seen.batches[2:]  # the second log covers steps 3 and 4
    looks = 6  # reset; start and end of two steps, the log's own
    seconds = (looks - 1) * SECONDS
    tokens = sum(sum(batch.num_tokens) for batch in batches)
    labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    slots = sum(batch.input_ids.numel() for batch in batches)
    assert sum(batch.num_padding for batch in batches) == slots - tokens
    assert last["supervised"] == pytest.approx(labels / tokens)
    assert last["packing"] == pytest.approx(tokens / slots)
    ratio = last["tokens/s"] / tokens
    assert last["images/s"] == pytest.approx(sum(len(batch.images or []) for batch in batches) * ratio)
    flops = stage.vlm.flops()
    work = sum(flops.batch(batch, int((batch.labels != IGNORE_INDEX).sum())) for batch in batches)
    assert last["mfu"] == pytest.approx(work * ratio / 1e9, rel=0.01)
    assert 1 / ratio == pytest.approx(seconds) and 0 < last["data_wait"] < 1
    assert last["tokens"] == sum(sum(batch.num_tokens) for batch in seen.batches)


def test_tokens_by_source_and_distance_from_the_weights(small_corpus):
    seen, throughput = Seen(), Throughput(every_n_steps=1)
    run(small_corpus, samples=8, num_steps=5, callbacks=[throughput, seen], log_every_n_steps=1)
    for name, share in (("digits", 2 / 3), ("text", 1 / 3)):
        own = [n for batch in seen.batches for n, source in zip(batch.num_tokens, batch.sources) if source == name]
        assert seen.logged[-1][f"tokens/{name}"] == sum(own) == throughput.source_tokens[name]
        assert seen.logged[-1]["mixture_off"] == pytest.approx(abs(len(own) / 40 - share))  # weights in samples
    again = Throughput()
    again.load_state_dict(throughput.state_dict())
    assert again.source_tokens == throughput.source_tokens and again.window == throughput.window


def test_the_window_forgets(small_corpus):
    throughput = Throughput()
    throughput.shares = {"a": 0.5, "b": 0.5}
    throughput.window.extend([(900, [900.0, 0.0]), (600, [300.0, 300.0])])
    assert throughput.mixture_off() == pytest.approx(0.3)


def test_gradient_norms_are_logged_by_group_before_clipping(small_corpus):
    logged = []
    for clip in (None, 1e-3):
        seen = Seen()
        run(small_corpus, 4, num_steps=1, callbacks=[seen], log_every_n_steps=1, gradient_clip_val=clip)
        logged.append({name: value for name, value in seen.logged[0].items() if name.startswith("grad_norm")})
    assert set(logged[0]) == {"grad_norm", "grad_norm/default", "grad_norm/default (1-D)"}
    total = sum(value**2 for name, value in logged[0].items() if "/" in name) ** 0.5
    assert logged[0]["grad_norm"] == pytest.approx(total) and total > 0.1
    assert logged[1] == pytest.approx(logged[0])


def test_measured_peak_is_that_of_a_matrix_product():
    assert 1e9 < measured_flops(torch.device("cpu"), torch.float32, seconds=0.05) < 1e15
