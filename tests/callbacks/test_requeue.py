"""A run that is signalled saves at a step's end, stops with status 85 and goes on to the same losses."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from step3vl.ablation.plot import read_curve
from step3vl.callbacks import Checkpoints
from step3vl.callbacks.requeue import Requeue, job_id, requeue
from step3vl.cli import main
from step3vl.signals import EXIT_UNFINISHED, SignalNote, shield_forks
from tests.saved import checkpoint, weights

RUN = (
    "fit -c experiments/step3vl_10b/1_pretrain_phase1.yaml --scale tiny --trainer.max_steps=8 --data.samples_per_step=8"
)
RUN += " --vars.warmup_steps=0 --trainer.log_every_n_steps=1 --data.val_sources=null --ckpt_path=last"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "pretrain", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stub on PATH that notes how it was called, and whether a checkpoint was there already."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stub = folder / "scontrol"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nls job/checkpoints >> {tmp_path}/calls || true\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tmp_path / "calls"


def signalled(folder, numbers, *more, env=None, group=False):
    """Start a run, send it signals once it trains, and wait for its end: (exit status, what it printed)."""
    command = [sys.executable, "-u", "-m", "step3vl", *RUN.split(), f"--trainer.default_root_dir={folder}", *more]
    full = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
    log = Path(f"{folder}.txt")
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=full, process_group=0)
    end_s = time.monotonic() + 120
    while child.poll() is None and "peak of a device" not in log.read_text() and time.monotonic() < end_s:
        time.sleep(0.05)
    time.sleep(0.5)
    for number in numbers:
        os.killpg(child.pid, number) if group else child.send_signal(number)
        time.sleep(0.02)
    return child.wait(120), log.read_text()


def steps_done(folder):
    return checkpoint(folder)["global_step"]


def test_a_requeued_job_ends_with_the_losses_of_an_uninterrupted_one(workplace, scontrol, capfd):
    """Three signals under SLURM's variables, to the whole process group, with a worker that loads data."""
    assert main([*RUN.split(), "--trainer.default_root_dir=whole"]) == 0  # --ckpt_path=last without one: it starts
    worker = "--data.num_workers=1"
    status, said = signalled("job", [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1], worker, env=SLURM, group=True)
    assert status == EXIT_UNFINISHED, said[-3000:]
    assert "job 4711 is requeued" in said
    assert 0 < steps_done("job") < 8
    (saved,) = (path.name for path in Path("job/checkpoints").iterdir())
    assert scontrol.read_text().split() == ["requeue", "4711", saved]
    assert not list(Path("job").rglob("hpc_ckpt*")), "Lightning's own requeueing was at work too"
    assert main([*RUN.split(), "--trainer.default_root_dir=job"]) == 0
    whole, resumed = read_curve(Path("whole")), read_curve(Path("job"))
    np.testing.assert_array_equal(resumed[0], whole[0])
    np.testing.assert_array_equal(resumed[1], whole[1])
    for name, weight in weights("whole").items():
        assert torch.equal(weight, weights("job")[name]), name


def test_a_signal_to_one_rank_stops_all(workplace, scontrol):
    """Two ranks; only the second hears SIGTERM. Both save the same step, and SLURM is not asked for anything."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=400"]
    command = [sys.executable, "-u", "-m", "step3vl", *RUN.split(), "--trainer.default_root_dir=job", *two]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    said = ""
    for line in child.stdout:
        said += line
        if "peak of a device" in line:
            (other,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            os.kill(int(other), signal.SIGTERM)
    assert child.wait(60) == EXIT_UNFINISHED, said[-3000:]
    assert "SIGTERM: saved after step" in said and not scontrol.exists()
    assert 0 < steps_done("job") < 400


class Small(LightningModule):
    """One weight, learnt from ones."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch) - 1).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(12, 1))


class SignalInBatch(Callback):
    """Signals its own process in the middle of one batch; None: before the first."""

    def __init__(self, batch_idx, *numbers):
        self.batch_idx, self.numbers = batch_idx, numbers

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.act(batch_idx)

    def on_train_start(self, trainer, pl_module):
        self.act(None)

    def act(self, batch_idx):
        if batch_idx == self.batch_idx:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def fit(folder, *numbers, at=3, saves=True, **trainer):
    callbacks = [SignalInBatch(at, *numbers), Requeue(), *([Checkpoints(every_n_steps=100)] if saves else [])]
    plain = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    logger = CSVLogger(folder, name="csv")
    Trainer(callbacks=callbacks, default_root_dir=folder, logger=logger, **plain, **trainer).fit(Small())


def test_the_step_in_progress_is_finished_logged_and_saved(tmp_path, scontrol, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, signal.SIGTERM, signal.SIGTERM, max_epochs=5)
    assert stop.value.code == EXIT_UNFINISHED and steps_done(tmp_path) == 4
    assert list(read_curve(tmp_path)[0]) == [0, 1, 2, 3], "the last step before the end is missing from the log"
    assert "goes on" in capfd.readouterr().out and not scontrol.exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_before_the_first_step_waits_for_it(tmp_path, monkeypatch):
    """Under SLURM, where Lightning would save inside of its handler; on several ranks that handler deadlocks."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        fit(tmp_path, signal.SIGTERM, signal.SIGUSR1, at=None, max_epochs=5)
    assert steps_done(tmp_path) == 1 and not list(tmp_path.rglob("hpc_ckpt*"))


def test_accumulated_gradients_are_not_cut(tmp_path):
    """Batch 3 of 0..11 is the first of a group of 3: the run stops after batch 5, not before."""
    with pytest.raises(SystemExit):
        fit(tmp_path, signal.SIGUSR1, max_epochs=5, accumulate_grad_batches=3)
    progress = checkpoint(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert steps_done(tmp_path) == 2 and progress["processed"] == 6


def test_a_run_that_is_signalled_in_its_last_step_just_ends(tmp_path):
    fit(tmp_path, signal.SIGUSR1, max_steps=4)
    assert steps_done(tmp_path) == 4


def test_nothing_to_save_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"also needs step3vl\.callbacks\.Checkpoints"):
        fit(tmp_path, saves=False, enable_checkpointing=False, max_steps=4)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        Requeue(every_n_steps=0)


def test_what_slurm_is_asked(scontrol, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert job_id() is None and requeue().startswith("not a SLURM job")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue() == "job 7_2 is requeued" and "requeue 7_2" in scontrol.read_text()
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho disabled >&2\nexit 1\n")
    assert requeue() == "job 7_2 could not be requeued (disabled); submit it again"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "could not be requeued" in requeue()


def test_forked_workers_leave_signals_to_their_parent():
    """A shielded child outlives SIGTERM; one forked after the shield is gone does not."""
    for shielded, status in ((signal.SIGTERM,), 7), ((), -signal.SIGTERM):
        shield_forks(shielded)
        child = multiprocessing.get_context("fork").Process(target=_end_with_7)
        child.start()
        shield_forks(())
        child.join(10)
        assert child.exitcode == status


def _end_with_7():
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)


def test_noted_signals_are_given_back():
    before = signal.getsignal(signal.SIGUSR2)
    with SignalNote([signal.SIGUSR2]) as note:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert note.seen == [signal.SIGUSR2]
        note.install()
    assert signal.getsignal(signal.SIGUSR2) == before
