"""Runs in processes of their own that cost no second import: forked from a server that has imported the command.

Each rank is what `step3vl fit ...` is, with the environment that a launcher gives it; it can be killed or stopped.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from step3vl import cli
from step3vl.weights.runs import saved_steps

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.warm", "tests.faults.record", "tests.faults.inject"])

RUN = "-c experiments/step3vl_10b/1_pretrain_phase1.yaml --scale tiny --trainer.max_steps=9 --trainer.precision=32-true"
RUN += " --trainer.log_every_n_steps=1 --vars.warmup_steps=0 --data.samples_per_step=4 --data.val_sources=null"
RUN += " --data.num_steps=4 --ckpt_path=last"
FSDP2 = ["--trainer.strategy=strategy/fsdp2.yaml", "--data.samples_per_step=2"]
"""For two ranks."""


class Run:
    """One start of a run: a process for each rank, in a group of their own; what they print is in FOLDER.N.txt.

    Args:
        folder: the run's.
        more: arguments after those of RUN.
        num_ranks: processes.
        callbacks: of the trainer, beside Record and Checkpoints.
        saves: arguments of Checkpoints.
        prepare: called in each process first, with its rank.
    """

    def __init__(self, folder, *more, num_ranks=1, callbacks=(), saves=None, prepare=None, run=RUN):
        self.folder = Path(folder)
        self.num_ranks = num_ranks
        saves = {"every_n_steps": 1, "asynchronous": True} | (saves or {})
        parts = [("tests.faults.record.Record", {"folder": str(folder)}), *callbacks]
        parts.append(("step3vl.callbacks.Checkpoints", saves))
        listed = [{"class_path": name, "init_args": arguments} for name, arguments in parts]
        words = ["fit", *run.split(), f"--trainer.default_root_dir={folder}", f"--trainer.callbacks={listed}", *more]
        if num_ranks > 1:
            words.insert(-len(more) or len(words), f"--trainer.devices={num_ranks}")
        number = next(n for n in range(1000) if not Path(f"{folder}.{n}.0.txt").exists())
        self.logs = [Path(f"{folder}.{number}.{rank}.txt") for rank in range(num_ranks)]
        with contextlib.chdir(Path(__file__).parents[2]):  # from where the server can import these tests
            forkserver.ensure_running()
        port = free_port()
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
            environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            arguments = (words, environment if num_ranks > 1 else {}, log, prepare, rank, os.getcwd())
            process = CONTEXT.Process(target=_rank, args=arguments)
            process.start()
            self.processes.append(process)

    def said(self, rank=0) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def send(self, number, rank=None) -> None:
        """Send a signal to one rank and its workers, or to all at once."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.killpg(process.pid, number)

    def kill(self) -> None:
        """SIGKILL to all ranks, and wait until they are gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s=120) -> list[int]:
        """The exit status of every rank; one that still runs after `timeout_s` is killed, and fails the test."""
        end_s = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, end_s - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hung:
            os.killpg(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].join()
        said = "\n".join(self.said(rank)[-2000:] for rank in range(self.num_ranks))
        assert not hung, f"ranks {hung} still ran after {timeout_s} s:\n{said}"
        return [process.exitcode for process in self.processes]

    def finish(self) -> None:
        """Wait; every rank must end well."""
        statuses = self.wait(300)
        assert statuses == [0] * self.num_ranks, "\n".join(self.said(rank)[-3000:] for rank in range(self.num_ranks))

    def until(self, condition, timeout_s=120) -> bool:
        """Wait for a condition; False when all ranks ended before."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            if not any(process.is_alive() for process in self.processes):
                return False
            assert time.monotonic() < end_s, self.said()[-2000:]
            time.sleep(0.002)
        return True

    def is_writing(self) -> bool:
        """Whether a checkpoint is half written at this moment."""
        return any((self.folder / "checkpoints").glob(".*.part"))

    def newest(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        found = saved_steps(self.folder / "checkpoints")
        return int(found[0].name.removeprefix("step-")) if found else 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(words, environment, log, prepare, rank, folder):
    """One rank, as the command line runs it."""
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.update(environment, OMP_NUM_THREADS="1", COLUMNS="140")
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    sys.argv = ["step3vl", *words]
    status = cli.main()  # of several ranks, does not return
    cli.leave(status)
