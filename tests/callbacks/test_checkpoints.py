"""Going on from an earlier checkpoint leaves none of a past that was given up; random numbers have no gap."""

import random

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from step3vl.callbacks import Checkpoints
from step3vl.weights.runs import choose, saved_steps, step_name

from .test_requeue import Small


class Draws(Callback):
    """Draws random numbers when a batch begins; ends the run in one batch, as a fault would."""

    def __init__(self, stop=None):
        self.stop, self.drawn = stop, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn[trainer.global_step] = (torch.rand(()).item(), random.random(), np.random.rand())
        if trainer.global_step == self.stop:
            raise MemoryError("the fault")


def fit(folder, max_steps, draws=None, ckpt_path=None, **saves):
    callbacks = [draws or Draws(), Checkpoints(**({"every_n_steps": 2, "keep_last": 9} | saves))]
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    logger = CSVLogger(folder, name="csv")
    trainer = Trainer(callbacks=callbacks, default_root_dir=folder, logger=logger, max_steps=max_steps, **quiet)
    trainer.fit(Small(), ckpt_path=ckpt_path)


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in saved_steps(folder)]


def test_going_back_puts_what_came_after_aside(tmp_path, capsys):
    fit(tmp_path, 6)
    folder = tmp_path / "checkpoints"
    assert steps(folder) == [6, 4, 2]
    fit(tmp_path, 4, ckpt_path=folder / step_name(2), keep_last=1)
    assert steps(folder) == [4] and steps(tmp_path / "checkpoints.1") == [6, 4], "4 is new, and the newest"
    assert (
        "held 2 checkpoints after step 2, from which this run goes on; they are in checkpoints.1"
        in capsys.readouterr().out
    )
    fit(tmp_path, 6, ckpt_path=tmp_path)
    assert steps(folder) == [6, 4] and not (tmp_path / "checkpoints.2").exists()
    fit(tmp_path, 2)
    assert steps(folder) == [2] and steps(tmp_path / "checkpoints.2") == [6, 4]
    assert "of an earlier run, up to step-00000006; they are in checkpoints.2 now" in capsys.readouterr().out


def test_going_on_from_another_run_keeps_none_of_this_one(tmp_path):
    fit(tmp_path / "a", 2)
    fit(tmp_path / "b", 2)
    fit(tmp_path / "b", 4, ckpt_path=tmp_path / "a/checkpoints")
    assert steps(tmp_path / "b/checkpoints") == [4] and steps(tmp_path / "b/checkpoints.1") == [2]


def test_random_numbers_go_on_whoever_draws_them_first(tmp_path):
    whole, before, after = Draws(), Draws(stop=5), Draws()
    for draws, ckpt_path in ((whole, None), (before, None), (after, tmp_path)):
        if ckpt_path is None:
            seed_everything(0, verbose=False)
        try:
            fit(tmp_path, 8, draws, ckpt_path)
        except MemoryError:
            continue
    assert {**before.drawn, **after.drawn} == whole.drawn and min(after.drawn) == 4


def test_a_disk_that_cannot_be_read_is_as_good_as_damaged(tmp_path, monkeypatch):
    fit(tmp_path, 4)
    from step3vl.weights import manifest

    digest = manifest.digest

    def failing(file):
        if step_name(4) in str(file):
            raise OSError(5, "Input/output error")
        return digest(file)

    monkeypatch.setattr(manifest, "digest", failing)
    said = []
    assert choose(tmp_path, said.append).name == step_name(2)
    assert "step-00000004 cannot be read: [Errno 5] Input/output error" in said[0]
