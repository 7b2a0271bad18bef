"""Programs of models in the sandbox: honest ones work, hostile ones are stopped, and none passes by force."""

import contextlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from step3vl.evaluation.sandbox import Limits, call, is_isolated, isolation, missing_isolation, run, same_value
from step3vl.evaluation.sandbox.syscalls import filter_program

SMALL = Limits(cpu_s=1, wall_s=1, memory_mb=128, output_kb=16, num_processes=12, file_mb=2)
EXPECTED = 9  # what answer(3) should be in the hostile programs that are called
BLOCKS = re.split(r"^=== ", Path(__file__).with_name("hostile_programs.txt").read_text(), flags=re.MULTILINE)[1:]
isolated = pytest.mark.skipif(not is_isolated(), reason=f"cannot isolate here: {missing_isolation()}")


def hostile():
    for block in BLOCKS:
        head, _, code = block.partition("\n")
        name, _, statuses = head.partition(": ")
        yield name, statuses.split(", "), code


def processes():
    """Programs, jails and wardens that run on this machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if re.search(rb"/program\.py|/jail\.py", (folder / "cmdline").read_bytes()):
                found.add((folder.name, (folder / "stat").read_text().rpartition(")")[2].split()[19]))
        except OSError:
            continue
    return found


def _cmdline(process):
    with contextlib.suppress(OSError):
        return Path("/proc", process[0], "cmdline").read_bytes()
    return b""


def markers():
    folders = {"/", "/tmp", "/dev/shm", "/var/tmp", "/root", "/home", "/usr", "/usr/lib", "/etc", os.getcwd()}
    folders |= {str(Path.cwd().parent), tempfile.gettempdir(), str(Path.home()), sys.base_prefix}
    return [name for f in folders if os.access(f, os.R_OK) for name in os.listdir(f) if "step3vl-hostile" in name]


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A word that lies where programs search: the environment, the temporary folder, the home folder, memory."""
    word = secrets.token_hex(8)
    os.environ["STEP3VL_SECRET"] = word
    places = [tmp_path_factory.mktemp("gold") / "gold.txt", Path(tempfile.gettempdir(), f"gold-{word}.txt")]
    for place in places:
        place.write_text(word)
    yield word
    places[1].unlink()
    del os.environ["STEP3VL_SECRET"]


@pytest.fixture(scope="module")
def outcomes(secret):
    """Every hostile program, run once, four at a time: its outcomes and seconds by name."""

    def attempt(program):
        name, _, code = program
        start = time.monotonic()
        outcome = call(code, "answer", [[3]], SMALL)[0] if name.startswith("call") else run(code, "one line\n", SMALL)
        return name, (outcome, time.monotonic() - start)

    before, start = processes(), time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        found = dict(pool.map(attempt, hostile()))
    left = processes() - before
    while left and time.monotonic() - start < 40:  # what another test run on this machine has started ends by itself
        time.sleep(0.2)
        left &= processes()
    found["processes left"] = left
    return found


def test_there_are_enough_hostile_programs():
    names = [name for name, _, _ in hostile()]
    assert len(names) == len(set(names)) >= 100 and sum(name.startswith("call") for name in names) >= 25


@isolated
@pytest.mark.parametrize(
    "name, statuses", [row[:2] for row in hostile()], ids=lambda v: v if isinstance(v, str) else ""
)
def test_hostile_program(name, statuses, outcomes, secret):
    outcome, seconds = outcomes[name]
    assert outcome.status in statuses, outcome
    assert outcome.seconds < SMALL.wall_s + 0.5 and seconds < SMALL.wall_s + 3, seconds
    assert "ESCAPED" not in outcome.stdout + outcome.stderr.replace('print("ESCAPED', "")
    assert secret not in outcome.stdout + outcome.stderr
    assert len(outcome.stdout) <= SMALL.output_kb * 1024 and len(outcome.stderr) <= SMALL.output_kb * 1024 + 100
    assert not (outcome.status == "ok" and same_value(outcome.value, EXPECTED))
    assert outcome.status == "ok" or outcome.value is None


@isolated
def test_hostile_programs_leave_nothing(outcomes):
    assert not outcomes["processes left"] and not markers()
    assert not list(Path(tempfile.gettempdir()).glob("step3vl-program-*"))
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(path.read_text().rpartition(")")[2].split()[:2])
    assert ["Z", str(os.getpid())] not in stats, "a zombie"


# ------------------------------------------------------------------------------------------------ honest programs


@isolated
def test_a_program_reads_and_prints():
    outcome = run("a, b = map(int, input().split())\nprint(a + b)", "3 4\n")
    assert (outcome.status, outcome.stdout, outcome.stderr, outcome.value) == ("ok", "7\n", "", None)
    assert run("import sys; print(len(sys.stdin.read()))", "é" * 2_000_000).stdout == "2000000\n"
    assert run("print('é', end='')").stdout == "é"
    failed = run("raise ValueError('no')")
    assert failed.status == "crash" and failed.stderr.endswith("ValueError: no")
    assert run("raise SystemExit(3)").status == "crash" and run("raise SystemExit(0)").status == "ok"


@isolated
def test_the_standard_library_works():
    code = """
import collections, dataclasses, functools, heapq, itertools, math, decimal, fractions, re, string, bisect, threading
import tempfile, sqlite3, ssl, zoneinfo, subprocess, sys, multiprocessing.pool
@dataclasses.dataclass
class Point:
    x: int
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
print(subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True).stdout, Point(3))
with multiprocessing.pool.ThreadPool(2) as pool:
    print(pool.map(abs, [-1]))
"""
    outcome = run(code)
    assert (outcome.status, outcome.stdout) == ("ok", "b'5\\n' Point(x=3)\n[1]\n"), outcome


@isolated
def test_values_come_out_of_functions():
    code = (
        "import dataclasses\ndef f(a, b=1):\n    print('noise')\n    return {'sum': a + b, 'pair': (a, b), 'set': {b}}"
    )
    first, second = call(code, "f", [[1, 2], [3]])
    assert first.status == second.status == "ok" and first.stdout == "noise\n"
    assert first.value == {"sum": 3, "pair": (1, 2), "set": {2}} and second.value["sum"] == 4
    given = [(1, [2.5]), {3, (4,)}, {5: None, (6, True): {"tuple": []}}]
    assert call("def f(*given): return list(given)", "f", [given])[0].value == given, "values keep their kinds"
    method = "class Solution:\n n = 0\n def add(self, x):\n  self.n += x\n  return self.n"
    assert [o.value for o in call(method, "Solution.add", [[2], [2]])] == [2, 2], "each call starts afresh"
    assert call(code, "f", []) == []
    wrong = call(code, "f", [["x", 1]])[0]
    assert wrong.status == "crash" and "TypeError" in wrong.stderr and wrong.value is None


@isolated
def test_many_threads_at_once():
    answers = [None] * 12
    threads = []
    for k in range(12):

        def work(k=k):
            answers[k] = run(f"print({k} + int(input()))", "100").stdout

        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert answers == [f"{100 + k}\n" for k in range(12)]


@isolated
def test_file_descriptors_do_not_grow():
    run("pass")
    before = len(os.listdir("/proc/self/fd"))
    for code in ("pass", "while True: print('x' * 9999)", "def (", "import os; os.fork()"):
        run(code, limits=SMALL)
    assert len(os.listdir("/proc/self/fd")) == before


@isolated
def test_programs_end_with_their_parent():
    """A killed trainer leaves no program behind: the jail hangs on a pipe that the kernel closes."""
    code = "from step3vl.evaluation.sandbox import Limits, run\n"
    code += "run('import time; time.sleep(60)', limits=Limits(wall_s=60))"
    before = processes()
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while (
        not (started := [p for p in processes() - before if b"program" in _cmdline(p)]) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert started
    parent.kill()
    parent.communicate()
    while processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes() - before


@isolated
def test_limits_hold():
    assert run("x = bytearray(300 << 20)", limits=Limits(memory_mb=400)).status == "ok"
    assert run("x = bytearray(300 << 20)", limits=Limits(memory_mb=200)).status == "memory"
    outcome = run("print('x' * 3000)", limits=Limits(output_kb=2))
    assert outcome.status == "output" and outcome.stdout == "x" * 2048 and "2 KB of output" in outcome.stderr
    outcome = run("import time\nprint('a', flush=True)\ntime.sleep(9)", limits=Limits(wall_s=0.3))
    assert outcome.status == "timeout" and outcome.stdout == "a\n" and "more than 0.3 s" in outcome.stderr
    assert 0.3 <= outcome.seconds < 0.8
    with pytest.raises(ValueError, match=r"Limits\.memory_mb=0: must be a finite number above 0"):
        Limits(memory_mb=0)
    with pytest.raises(ValueError, match="wall_s=inf"):
        Limits(wall_s=float("inf"))


@isolated
def test_numpy_is_there_when_asked_for_and_read_only():
    pytest.importorskip("numpy", reason="numpy is not installed")
    code = "import numpy as np\nprint((np.eye(64) @ np.ones(64)).sum(), __name__)"
    assert run(code).status == "crash", "not unless asked for"
    outcome = run(code, packages=["numpy"])
    assert (outcome.status, outcome.stdout) == ("ok", "64.0 __main__\n"), outcome
    function = "import numpy as np\ndef f(x): return np.float64(x), np.bool_(True), list(np.arange(2)), {np.int8(3)}"
    assert call(function, "f", [[0.5]], packages=["numpy"])[0].value == (0.5, True, [0, 1], {3})
    assert call("import numpy\ndef f(): return numpy.eye(2)", "f", [[]], packages=["numpy"])[0].status == "crash"
    look = "import os\nprint(sorted(os.listdir('/packages')))\nimport torch"
    found = run(look, packages=["numpy"])
    assert found.stdout in ("['numpy']\n", "['numpy', 'numpy.libs']\n") and "No module named 'torch'" in found.stderr
    with pytest.raises(ValueError, match="package 'torch' is not one that programs may have: numpy"):
        run("pass", packages=["torch"])


@isolated
@pytest.mark.parametrize(
    "code, status",
    [
        ("open('/packages/numpy/__init__.py', 'a')", "crash"),
        ("import os\nos.chmod('/packages/numpy', 0o777)", "crash"),
        ("np.memmap('/packages/numpy/x', mode='w+', shape=8)", "crash"),
        ("np.ones((1 << 32,))", "memory"),
        ("a = np.ones((4000, 4000))\nwhile True:\n    a @ a", "timeout"),
        ("np.ctypeslib.ctypes.string_at(0)", "crash"),
        ("np.load('/program.py', allow_pickle=True)", "crash"),
    ],
)
def test_numpy_gives_no_way_out(code, status):
    pytest.importorskip("numpy", reason="numpy is not installed")
    limits = Limits(cpu_s=1, wall_s=2, memory_mb=512)
    assert run(f"import numpy as np\n{code}\nprint('ESCAPED')", limits=limits, packages=["numpy"]).status == status


# ------------------------------------------------------------------------------------------------ refusals


def test_a_machine_without_isolation_refuses(monkeypatch):
    monkeypatch.setattr(
        "step3vl.evaluation.sandbox.execute.missing_isolation", lambda: ("user namespace: not permitted",)
    )
    for attempt in (lambda: run("print(1)"), lambda: call("def f(): return 1", "f", [[]])):
        with pytest.raises(
            RuntimeError, match=r"cannot isolate .*user namespace: not permitted.*allow_unisolated=True"
        ):
            attempt()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are watched through Linux's /proc")
def test_unisolated_programs_run_when_allowed(monkeypatch):
    monkeypatch.setattr("step3vl.evaluation.sandbox.execute.missing_isolation", lambda: ("no namespaces",))
    outcome = run(
        "import os\nprint(input(), os.listdir('.'), 'STEP3VL' in str(os.environ))", "hi", allow_unisolated=True
    )
    assert (outcome.status, outcome.stdout) == ("ok", "hi [] False\n"), outcome
    assert call("def f(x): return x + 1", "f", [[1], [2]], allow_unisolated=True)[1].value == 3
    if find_spec("numpy"):
        assert run("import numpy\nprint(numpy.sum([1, 2]))", allow_unisolated=True, packages=["numpy"]).stdout == "3\n"
    assert run("while True: pass", limits=SMALL, allow_unisolated=True).status == "timeout"
    assert run("x = bytearray(1 << 30)", limits=SMALL, allow_unisolated=True).status == "memory"
    before = processes()
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)"
    assert run(daemon, limits=SMALL, allow_unisolated=True).status == "ok"
    assert not processes() - before, "orphans are adopted and ended even without a pid namespace"
    assert not list(Path(tempfile.gettempdir()).glob("step3vl-program-*"))


def test_what_is_no_program_is_refused():
    if not is_isolated():
        pytest.skip("nothing is run here at all")
    large = run("#" * 1_000_001)
    assert large.status == "refused" and "1,000,001 bytes, at most 1,000,000" in large.stderr
    assert run("print('\ud800')").status == "refused"
    assert [o.status for o in call("\udfff", "f", [[], []])] == ["refused"] * 2
    with pytest.raises(ValueError, match="arguments of f must be plain values"):
        call("def f(x): pass", "f", [[object()]])


@isolated
def test_the_probe_notices_what_is_missing(monkeypatch):
    """Without a filter, a limit or a namespace the probe must say so: it tries, it does not ask."""
    from step3vl.evaluation.sandbox import execute

    probe = isolation.missing_isolation.__wrapped__
    assert probe() == ()
    monkeypatch.setattr(execute, "filter_program", lambda: b"")
    assert any("any system call" in sentence for sentence in probe())


def test_the_filter_is_whole():
    code = filter_program()
    if code is None:
        pytest.skip("no filter for this machine")
    assert len(code) % 8 == 0 and len(code) < 8 * 4096
    assert code[-16:-8] == bytes.fromhex("060000000000ff7f") and code[-8:] == bytes.fromhex("0600000001000500")


# ------------------------------------------------------------------------------------------------ comparison


@pytest.mark.parametrize(
    "said, gold, equal",
    [
        ((1, 2), (1, 2), True),
        ({1, 2}, {2, 1}, True),
        ({1: "a"}, {1: "a"}, True),
        ((1, [2.0]), (1, [2]), True),
        (3, 3.0, True),
        (1, True, True),
        (None, None, True),
        ([1, 2], (1, 2), False),
        ({"1": "a"}, {1: "a"}, False),
        (0.1 + 0.2, 0.3, False),
        ("3", 3, False),
        ([1, 2], [2, 1], False),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        (None, 0, False),
        ([], {}, False),
        (float("nan"), 3.0, False),
        (10**400, 3.0, False),
        ("ab", ["a", "b"], False),
    ],
)
def test_same_value(said, gold, equal):
    assert same_value(said, gold) is equal


def test_nesting_without_end_is_no_value():
    deep, other = [], []
    for _ in range(100_000):
        deep, other = [deep], [other]
    assert same_value(deep, other) is False
