"""Child processes that end with us: each leads a process group of its own, and a signal to us is passed on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from step3vl.signals import EXIT_UNFINISHED, SignalNote

GRACE_S = 120.0
"""Seconds that children have to finish their step, save and stop."""
POLL_S = 0.2


def start(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen:
    """A child that writes to the end of `log`, at the head of a process group of its own."""
    with log.open("a") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, process_group=0)


def local_env(num_threads: int) -> dict[str, str]:
    """Environment of a child on this machine. SLURM's variables describe us, not it, and are left out."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**inherited, "OMP_NUM_THREADS": str(num_threads), "COLUMNS": "140"}


def note_stops() -> SignalNote:
    """Notes what asks this process to stop: SIGTERM, SLURM's SIGUSR1, and Ctrl-C and hang-up if not ignored."""
    polite = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    return SignalNote((signal.SIGTERM, signal.SIGUSR1, *polite))


def end(children: Sequence[subprocess.Popen], note: SignalNote, console: Console, grace_s: float = GRACE_S) -> None:
    """Ask children to save and stop, wait, then kill what they left running; one more signal kills at once."""
    alive = [child for child in children if child.poll() is None]
    if alive:
        console.print(f"waiting for {len(alive)} to save and stop (again: stop at once)", highlight=False)
    for child in alive:
        child.terminate()  # the head of the group alone: it tells its ranks, and its workers are needed to the end
    limit_s, num_seen = time.monotonic() + grace_s, len(note.seen)
    while any(child.poll() is None for child in alive) and time.monotonic() < limit_s and len(note.seen) == num_seen:
        time.sleep(POLL_S)
    for child in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def exit_status(note: SignalNote, console: Console) -> int:
    """What a command that was asked to stop ends with, its children having ended; Ctrl-C is raised again."""
    if signal.SIGUSR1 in note.seen:
        from step3vl.callbacks.requeue import requeue

        console.print(requeue(), highlight=False)
    if signal.SIGINT in note.seen:
        raise KeyboardInterrupt
    console.print("stopped; the same command goes on", highlight=False)
    return EXIT_UNFINISHED
