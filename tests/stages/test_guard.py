"""A bad step changes nothing, is named, and does not go on for ever; spikes are told from noise."""

import math
import random

import pytest
import torch

from step3vl.losses import CrossEntropy
from step3vl.stages.guard import Diverged, Guard
from step3vl.types import WeightedSum

from .test_pretrain import Losses, run


class Poison(CrossEntropy):
    """The real loss, but for some steps: there a loss, or only its gradient, is not a number."""

    def __init__(self, steps, where):
        super().__init__()
        self.steps, self.where, self.step = steps, where, -1

    def __call__(self, hidden, lm_head, batch):
        self.step += 1
        if self.step in self.steps and self.where == "gradient":
            hidden.register_hook(lambda gradient: gradient * math.nan)
        total = super().__call__(hidden, lm_head, batch)
        if self.step in self.steps and self.where == "loss":
            return WeightedSum(total.value * math.inf, total.weight)
        return total


class Snapshots(Losses):
    """Parameters and the optimizer's state after every step."""

    def __init__(self):
        super().__init__()
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        for i, moments in trainer.optimizers[0].state_dict()["state"].items():
            state |= {f"{i}.{name}": value.clone() for name, value in moments.items() if torch.is_tensor(value)}
        self.states.append(state)


def same(a, b) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def poisoned(corpus, steps, where, monkeypatch, num_steps=4, optimizer="adamw"):
    from step3vl.optim import MuonAdamW

    factories = {"adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2), "muon": lambda groups: MuonAdamW(groups)}
    monkeypatch.setattr("step3vl.stages.pretrain.CrossEntropy", lambda: Poison(steps, where))
    seen = Snapshots()
    run(corpus, 4, num_steps=num_steps, optimizer=factories[optimizer], callbacks=[seen], gradient_clip_val=1.0)
    return seen.states


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_changes_nothing_and_the_next_trains(small_corpus, monkeypatch, capsys, where, optimizer):
    states = poisoned(small_corpus, [1], where, monkeypatch, optimizer=optimizer)
    assert same(states[1], states[0])
    assert not same(states[2], states[1]) and not same(states[3], states[2])
    assert all(value.isfinite().all() for value in states[3].values())
    out = capsys.readouterr().out
    found = "the loss is inf" if where == "loss" else "the norm of the gradient is nan"
    assert f"step 1 refused: {found}; weights and moments stay as they were" in out
    assert "samples of that step on rank 0: " in out and out.count("train-") >= 4


def test_a_bad_first_step_is_refused_too(small_corpus, monkeypatch):
    clean = poisoned(small_corpus, [], "loss", monkeypatch, num_steps=1)
    states = poisoned(small_corpus, [0], "loss", monkeypatch, num_steps=2)
    assert not same(states[0], clean[0]) and not same(states[1], states[0])


def test_too_many_in_a_row_end_the_run(small_corpus, monkeypatch):
    with pytest.raises(Diverged, match="5 steps in a row were refused"):
        poisoned(small_corpus, range(2, 9), "gradient", monkeypatch, num_steps=9)
    poisoned(small_corpus, [1, 2, 3, 4, 6, 7, 8], "loss", monkeypatch, num_steps=9)  # four in a row are borne


def test_a_spike_is_caught_and_noise_is_not():
    noise = random.Random(0)
    guard = Guard(spike_sigmas=6.0)
    alarms = [guard.judge(2.0 + noise.gauss(0, 0.1), 1.0) for _ in range(10_000)]
    assert sum(reason is not None for reason in alarms) <= 1
    again = Guard(spike_sigmas=6.0)
    again.load_state_dict(guard.state_dict())
    for one in (guard, again):
        assert "more than 6 standard deviations" in one.judge(2.8, 1.0)
        assert one.judge(2.1, 1.0) is None
    assert Guard().judge(1e9, 1.0) is None


def test_nothing_is_a_spike_before_there_is_a_past():
    guard = Guard(spike_sigmas=3.0, window=20)
    assert [guard.judge(loss, 1.0) for loss in (9.0, 1.0, 5.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0)] == [None] * 9


def test_refusals():
    with pytest.raises(ValueError, match="stop_after must be at least 1"):
        Guard(stop_after=0)
    with pytest.raises(ValueError, match="spike_sigmas must be above 0 or null, got -1"):
        Guard(spike_sigmas=-1)


def test_a_rewound_run_leaves_the_bad_data_out_and_goes_on(workplace, capsys, monkeypatch):
    """Data of planned steps 4 and 5 make the loss infinite: the run ends, and goes on with those after them."""
    from step3vl.ablation.plot import read_curve
    from step3vl.cli import main

    run = ["fit", "-c", "experiments/step3vl_10b/1_pretrain_phase1.yaml", "--scale=tiny", "--trainer.max_steps=8"]
    run += ["--data.samples_per_step=4", "--data.val_sources=null", "--trainer.log_every_n_steps=1", "--ckpt_path=last"]
    saves = "[{class_path: step3vl.callbacks.Checkpoints, init_args: {every_n_steps: 2}}]"
    run += [f"--trainer.callbacks={saves}", "--model.guard.stop_after=2", "--model.guard.max_rewinds=1"]
    assert main([*run, "--data.left_out=[[4, 6]]", "--trainer.default_root_dir=clean"]) == 0

    from step3vl.data.loader import PackedBatches

    number, read = [], PackedBatches.__getitem__

    def poisoned_batch(self, step):
        batch = read(self, step)
        if "bad" in number and batch.sample_ids[0] in number[1]:
            batch.loss_weights = batch.loss_weights * math.inf
        return batch

    ids: list[str] = []

    def noted(self, step):
        batch = read(self, step)
        ids.append(batch.sample_ids[0])
        return batch

    monkeypatch.setattr(PackedBatches, "__getitem__", noted)
    assert main([*run, "--trainer.default_root_dir=seen", "--trainer.max_steps=6"]) == 0
    number += ["bad", set(ids[4:6])]
    monkeypatch.setattr(PackedBatches, "__getitem__", poisoned_batch)
    with pytest.raises(SystemExit) as end:
        main([*run, "--trainer.default_root_dir=bad"])
    assert end.value.code == 85
    assert "micro-batches 4 to 5 (1 of 1 rewinds)" in capsys.readouterr().out
    assert main([*run, "--trainer.default_root_dir=bad"]) == 0
    clean, rewound = read_curve(workplace / "clean"), read_curve(workplace / "bad")
    assert list(clean[1][4:]) == list(rewound[1][-4:]), "it did not go on with the data after the bad ones"


def test_rewinds_are_counted_and_end():
    with pytest.raises(ValueError, match="max_rewinds must be 0 or more"):
        Guard(max_rewinds=-1)
    guard = Guard(stop_after=2)
    guard.judge(math.nan, 1.0)
    assert not guard.is_over
    guard.judge(math.nan, 1.0)
    assert guard.is_over
