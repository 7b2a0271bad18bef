"""The thresholds take effect in the process and in workers, and yield to what the user has set."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from step3vl.data import malloc

SCRIPT = """
import json, resource, sys
from step3vl.data.malloc import keep_freed_memory, worker_init

SIZE = 40 * 2**20

def faults():
    for _ in range(3):
        b"x" * SIZE
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"x" * SIZE
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

class Faults:
    def __len__(self): return 1
    def __getitem__(self, i): return faults()

if __name__ == "__main__":
    where, init = sys.argv[1], sys.argv[2] == "on"
    if where == "process":
        said = keep_freed_memory() if init else None
        print(json.dumps([said, faults()]))
    else:
        from torch.utils.data import DataLoader
        init = worker_init if init else None
        loader = DataLoader(Faults(), None, num_workers=1, multiprocessing_context="spawn", worker_init_fn=init)
        print(json.dumps([None, next(iter(loader))]))
"""
glibc = pytest.mark.skipif(not malloc.has_glibc(), reason="these are settings of glibc")


def run(tmp_path, where: str, init: str, **variables: str) -> tuple[bool | None, int]:
    """What keep_freed_memory said in a fresh process, and the page faults of five 40 MiB buffers after it."""
    script = tmp_path / "faults.py"
    script.write_text(SCRIPT)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(script), where, init],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = json.loads(done.stdout)
    return said, faults


@glibc
def test_freed_memory_is_used_again(tmp_path):
    _, by_default = run(tmp_path, "process", "off")
    said, ours = run(tmp_path, "process", "on")
    assert said is True
    assert ours < 0.05 * by_default, (ours, by_default)
    _, worker = run(tmp_path, "worker", "on")
    assert worker < 0.05 * by_default, (worker, by_default)


@glibc
def test_what_the_user_has_set_stays(tmp_path):
    _, by_default = run(tmp_path, "process", "off")
    for variables in (
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ):
        said, faults = run(tmp_path, "process", "on", **variables)
        assert said is False
        assert faults > 0.5 * by_default, variables


class Elsewhere:
    """A C library without glibc's names."""


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert malloc.keep_freed_memory() is False
    monkeypatch.setattr(malloc.sys, "platform", "linux")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Elsewhere())
    assert malloc.keep_freed_memory() is False
    assert malloc.worker_init(0) is None


class Old:
    """A glibc that refuses thresholds above 32 MiB, and remembers what it was told."""

    def __init__(self):
        self.told = []
        self.gnu_get_libc_version = None

    def mallopt(self, parameter: int, value: int) -> int:
        self.told.append((parameter, value))
        return int(parameter != malloc.M_MMAP_THRESHOLD or value <= 32 * 2**20)


def test_an_older_glibc_gets_the_largest_value_it_takes(monkeypatch):
    old = Old()
    monkeypatch.setattr(malloc.sys, "platform", "linux")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: old)
    for variable in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(variable, raising=False)
    assert malloc.keep_freed_memory() is True
    assert old.told == [(-3, 512 * 2**20), (-3, 32 * 2**20), (-1, 2**30)]
