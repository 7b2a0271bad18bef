"""Whether every rank of a run still lives: one that died or was stopped is named, and the others end.

A rank that waits for others in a collective operation still beats, from a thread; a dead or a stopped one does not.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from subprocess import Popen
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

EXIT_RANK_LOST = 86
"""Exit status of a rank that ends because another is dead or silent."""

LOST_PEER = re.compile(r"by peer|gloo|nccl|broken pipe|socket", re.IGNORECASE)
"""What communication says when a peer is gone, in whatever it is wrapped."""


class Heartbeat(Callback):
    """On several ranks, each beats every few seconds; one that stops is named, and all others end with status 86.

    The first rank keeps the beats in a small store and judges the others, who judge the first. A process that was
    started by this one and ended badly is named two beats later. Time in which a rank was itself stopped (a
    suspended job) does not count against others. A rank that lives but computes for ever is not found: `timeout_s` of
    the strategy ends that.

    Args:
        every_s: seconds between beats.
        timeout_s: silence that ends the run; after a broken connection, three beats are enough.
    """

    def __init__(self, every_s: float = 5.0, timeout_s: float = 1800.0):
        if every_s <= 0 or timeout_s < 3 * every_s:
            raise ValueError(
                f"Heartbeat: every_s must be above 0 and timeout_s at least three times as long, got {every_s} and "
                f"{timeout_s}"
            )
        self.every_s, self.timeout_s = every_s, timeout_s
        self.watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self.watch is not None:
            return
        store = open_store(trainer, timedelta(seconds=self.timeout_s))
        processes = getattr(trainer.strategy.launcher, "procs", [])
        children = {trainer.global_rank + 1 + number: process for number, process in enumerate(processes)}
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":  # Lightning's kills all ranks without a word, also good ones
                thread._child_processes = []  # type: ignore[attr-defined]
        self.watch = Watch(store, trainer.global_rank, trainer.world_size, self.every_s, self.timeout_s, children)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.watch is not None:
            self.watch.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.watch is not None:
            self.watch.step = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.watch is None:
            return
        if isinstance(exception, KeyboardInterrupt):
            self.watch.stop(wait_s=0)
        elif isinstance(exception, SystemExit):
            self.watch.stop()
        else:
            self.watch.fail(exception)
        self.watch = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.watch is not None:
            self.watch.stop()
            self.watch = None


def open_store(trainer: Trainer, timeout: timedelta) -> torch.distributed.TCPStore:
    """A store of its own in the first rank's process: the training's would keep a beat waiting behind its own use."""
    environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    host, store = environment.main_address, None
    if trainer.is_global_zero:
        store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        for key in ("verdict", "hurry", *(_beat(rank) for rank in range(trainer.world_size))):
            store.set(key, "")  # reading a key that is not there would wait for it
    port = trainer.strategy.broadcast(store.port if store is not None else 0)
    if store is None:
        store = torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return store


class Watch:
    """Two threads of one rank: one beats and reads, and may have to wait for the store; the other judges.

    Args:
        store: where beats are kept; dies with the first rank.
        rank: this rank.
        num_ranks: all of them.
        every_s: seconds between beats.
        timeout_s: silence that ends the run.
        children: ranks that this process has started.
    """

    def __init__(
        self,
        store: torch.distributed.TCPStore,
        rank: int,
        num_ranks: int,
        every_s: float,
        timeout_s: float,
        children: Mapping[int, Popen],
    ):
        self.store, self.rank, self.every_s, self.timeout_s = store, rank, every_s, timeout_s
        self.children, self.host, self.step = dict(children), socket.gethostname(), 0
        self.watched = list(range(1, num_ranks)) if rank == 0 else [0]
        self._beats = dict.fromkeys(self.watched, "")  # as last read: "number step host", and "done" at the end
        self._told: tuple[str, str] = ("", "")  # verdict, hurry
        self._num_looks = dict.fromkeys(self.children, 0)  # at a child since it ended
        self._is_store_gone = False
        self._over = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def stop(self, wait_s: float | None = None) -> None:
        """This rank is done. The first waits until all are, as the store ends with it."""
        self._over.set()
        for thread in self._threads:
            thread.join(wait_s)

    def fail(self, error: BaseException) -> None:
        """This rank ends with an error. After a broken connection, wait until the rank that broke it is named."""
        text = " ".join(str(error).split())
        if LOST_PEER.search(f"{type(error).__name__} {text}"):
            self._set("hurry", "now")
            time.sleep(8 * self.every_s)  # the judge ends the process before that, if some rank is lost
        self._say(f"rank {self.rank} on {self.host} failed at step {self.step}: {type(error).__name__}: {text[:300]}")
        self.stop(wait_s=2 * self.every_s)

    # ------------------------------------------------------------------------------------------------ inside

    def _beat(self) -> None:
        keys, number = [*map(_beat, self.watched), "verdict", "hurry"], 0
        while True:
            number, is_over = number + 1, self._over.is_set()
            try:
                self.store.set(_beat(self.rank), f"{number} {self.step} {self.host}" + (" done" if is_over else ""))
                if is_over and (self.rank or self._all_done()):
                    return
                *beats, verdict, hurry = (value.decode() for value in self.store.multi_get(keys))
            except RuntimeError:
                self._is_store_gone = True
                return
            self._beats, self._told = dict(zip(self.watched, beats)), (verdict, hurry)
            time.sleep(min(0.02, self.every_s)) if is_over else self._over.wait(self.every_s)

    def _judge(self) -> None:
        """Looks twice a beat; silence is counted in looks, so that time in which this rank was stopped is none."""
        seen, silent_s, last_s = dict(self._beats), dict.fromkeys(self.watched, 0.0), time.monotonic()
        while not (self._over.is_set() and (self.rank or self._all_done())):
            self._over.wait(self.every_s / 2)
            if self._over.is_set():
                time.sleep(min(0.02, self.every_s))
            now_s = time.monotonic()
            passed_s, last_s = min(now_s - last_s, self.every_s), now_s
            beats, (verdict, hurry) = self._beats, self._told
            for other in self.watched:
                silent_s[other] = 0.0 if beats[other] != seen[other] else silent_s[other] + passed_s
            seen = beats
            patience_s = 3 * self.every_s if hurry else self.timeout_s
            lost = [r for r in self.watched if silent_s[r] >= patience_s and not beats[r].endswith("done")]
            if verdict and not self._over.is_set():
                self._over.wait(2 * self.every_s)  # an error that all ranks have ends each of them by itself
                if not self._over.is_set():
                    self._end(verdict)
            elif ended := self._ended_child():
                self._end(ended)
            elif self._is_store_gone and self.rank and not self._over.is_set():
                self._end(f"{self._name(0)} is gone: its end of the connection is closed")
            elif lost:
                self._end(f"{self._name(lost[0])} is silent for {silent_s[lost[0]]:.0f} s: dead, stopped or cut off")

    def _ended_child(self) -> str | None:
        """How a child ended badly; said at the fourth look, when the last that it had to say has been read."""
        for other, process in self.children.items():
            if process.poll() and not self._beats.get(other, "").endswith("done"):
                self._num_looks[other] += 1
                if self._num_looks[other] >= 4:
                    code = process.returncode
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                    return f"{self._name(other)} {how}"
        return None

    def _name(self, other: int) -> str:
        words = self._beats.get(other, "").split()
        return f"rank {other} on {words[2]}, last seen at step {words[1]}," if len(words) > 2 else f"rank {other}"

    def _all_done(self) -> bool:
        return all(beat.endswith("done") for beat in self._beats.values())

    def _say(self, verdict: str) -> None:
        """Tell all ranks, unless another was first."""
        try:
            if not self._is_store_gone:
                self.store.compare_set("verdict", "", verdict)
        except RuntimeError:
            self._is_store_gone = True

    def _set(self, key: str, value: str) -> None:
        try:
            self.store.set(key, value)
        except RuntimeError:
            self._is_store_gone = True

    def _end(self, verdict: str) -> None:
        """End this process, whatever its main thread waits for, and those it has started."""
        print(
            f"error: {verdict}; rank {self.rank} on {self.host} ends at step {self.step} with status {EXIT_RANK_LOST}, "
            "and the same command with --ckpt_path=last goes on",
            file=sys.stderr,
            flush=True,
        )
        if self.rank == 0 or self.children:
            threading.Thread(
                target=self._say, args=(verdict,), daemon=True
            ).start()  # waits for ever if rank 0 is stopped
            time.sleep(2 * self.every_s)  # in which the others read it
        for process in self.children.values():
            process.kill()
        sys.stdout.flush()
        os._exit(EXIT_RANK_LOST)


def _beat(rank: int) -> str:
    return f"beat/{rank}"
