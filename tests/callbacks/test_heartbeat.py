"""A rank that died, was stopped or failed is named, and the others end; ranks that end well are left alone."""

import os
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from step3vl.callbacks import Heartbeat
from step3vl.callbacks.heartbeat import EXIT_RANK_LOST, Watch, _beat

NUM_RANKS = 3
EVERY_S = 0.1


class Ranks:
    """Forked processes that do nothing but watch each other, until `act` says otherwise."""

    def __init__(self, folder, act, timeout_s):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.logs = [folder / f"{rank}.txt" for rank in range(NUM_RANKS)]
        self.pids = []
        for rank in range(NUM_RANKS):
            pid = os.fork()
            if pid == 0:
                rank_main(rank, port, self.logs[rank], act, timeout_s)
            self.pids.append(pid)
        end_s = time.monotonic() + 20
        while not all(log.exists() and "watching" in log.read_text() for log in self.logs):
            assert time.monotonic() < end_s, [log.read_text() for log in self.logs if log.exists()]
            time.sleep(0.02)

    def wait(self, timeout_s=15.0):
        """How each ended: a status, minus a signal, or None for one that did not, and is killed now."""
        ends, end_s = {}, time.monotonic() + timeout_s
        while len(ends) < NUM_RANKS and time.monotonic() < end_s:
            for rank, pid in enumerate(self.pids):
                if rank not in ends:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        ends[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for rank, pid in enumerate(self.pids):
            if rank not in ends:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [ends.get(rank) for rank in range(NUM_RANKS)]

    def said(self, rank):
        return self.logs[rank].read_text()


def rank_main(rank, port, log, act, timeout_s):
    """What a forked rank does; it never returns."""
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        store = None
        for _ in range(100):
            try:
                store = TCPStore(
                    "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=20)
                )
                break
            except RuntimeError:
                time.sleep(0.05)
        if rank == 0:
            for key in ("verdict", "hurry", *map(_beat, range(NUM_RANKS)), "ready"):
                store.set(key, "")
        store.wait(["ready"])
        watch = Watch(store, rank, NUM_RANKS, EVERY_S, timeout_s, {})
        watch.step = 7
        time.sleep(4 * EVERY_S)
        print("watching")
        act(rank, watch)
        status = 0
    finally:
        os._exit(status)


def wait_for_ever(rank, watch):
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_is_named_and_the_others_end(tmp_path, number, lost):
    ranks = Ranks(tmp_path, wait_for_ever, timeout_s=1.0)
    start_s = time.monotonic()
    os.kill(ranks.pids[lost], number)
    ends = ranks.wait(4.0)
    others = [rank for rank in range(NUM_RANKS) if rank != lost]
    assert [ends[rank] for rank in others] == [EXIT_RANK_LOST] * 2, [ranks.said(rank) for rank in others]
    assert ends[lost] == (None if number == signal.SIGSTOP else -signal.SIGKILL)
    for rank in others:
        assert f"error: rank {lost} on {socket.gethostname()}, last seen at step 7, is" in ranks.said(rank)
    assert number == signal.SIGSTOP or time.monotonic() - start_s < 5


def test_ranks_that_end_at_different_times_are_left_alone(tmp_path):
    """The first rank is done first, and keeps the store until the last is; that takes longer than the patience."""

    def act(rank, watch):
        time.sleep(rank)
        watch.stop()

    ranks = Ranks(tmp_path, act, timeout_s=0.5)
    assert ranks.wait() == [0, 0, 0], [ranks.said(rank) for rank in range(NUM_RANKS)]


def test_a_job_that_is_suspended_goes_on(tmp_path):
    """All ranks stopped for longer than the patience, then continued, one after another."""

    def act(rank, watch):
        time.sleep(3)
        watch.stop()

    ranks = Ranks(tmp_path, act, timeout_s=1.0)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.2)
    assert ranks.wait() == [0, 0, 0], [ranks.said(rank) for rank in range(NUM_RANKS)]


def test_an_error_of_one_rank_is_told_by_all(tmp_path):
    def act(rank, watch):
        if rank == 1:
            watch.fail(ValueError("no such thing"))
        else:
            time.sleep(60)

    ranks = Ranks(tmp_path, act, timeout_s=30.0)
    assert ranks.wait() == [EXIT_RANK_LOST, 0, EXIT_RANK_LOST]
    for rank in (0, 2):
        assert f"rank 1 on {socket.gethostname()} failed at step 7: ValueError: no such thing" in ranks.said(rank)


def test_a_broken_connection_names_the_rank_that_broke_it(tmp_path):
    """Ranks 0 and 1 learn from a collective operation that a peer is gone: the silent one is named, not they."""

    def act(rank, watch):
        if rank == 2:
            os._exit(0)
        time.sleep(0.5)
        watch.fail(RuntimeError("Connection closed by peer [10.0.0.7]:2222"))

    ranks = Ranks(tmp_path, act, timeout_s=1000.0)
    assert ranks.wait() == [EXIT_RANK_LOST, EXIT_RANK_LOST, 0]
    for rank in (0, 1):
        assert f"error: rank 2 on {socket.gethostname()}, last seen at step 7, is silent for" in ranks.said(rank)


def test_a_failed_rank_does_not_hide_a_dead_one(tmp_path):
    """Rank 1 fails and says so, rank 2 is dead, and rank 0 is done: it must not wait for rank 2."""

    def act(rank, watch):
        if rank == 1:
            watch.fail(ValueError("no such thing"))
        elif rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            watch.stop()

    ranks = Ranks(tmp_path, act, timeout_s=1.0)
    assert ranks.wait() == [EXIT_RANK_LOST, 0, -signal.SIGKILL]
    assert "rank 2" in ranks.said(0)


def test_the_same_error_on_all_ranks_is_not_talked_over(tmp_path):
    def act(rank, watch):
        watch.fail(ValueError("loss is not finite"))

    ranks = Ranks(tmp_path, act, timeout_s=30.0)
    assert ranks.wait() == [0, 0, 0] and not any("error:" in ranks.said(rank) for rank in range(NUM_RANKS))


def test_refusals():
    with pytest.raises(ValueError, match="timeout_s at least three times as long, got 5 and 10"):
        Heartbeat(every_s=5, timeout_s=10)
