"""Mathematical answers are judged as math-verify judges them, and none can hold or hurt the pool."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from step3vl.evaluation import math_pool
from step3vl.evaluation.math_pool import MAX_CHARACTERS, MathPool, verify

HERE = Path(__file__).parent
TIMEOUT_S = 0.5
pytest.importorskip("math_verify", reason="math-verify is optional: pip install 'step3vl[rl]'")


@pytest.fixture(scope="module")
def pool():
    with MathPool(num_workers=4, timeout_s=TIMEOUT_S) as pool:
        yield pool


def hostile():
    rows = json.loads((HERE / "hostile_answers.json").read_text())
    return [row["text"] if "text" in row else row["before"] * row["times"] + row["after"] for row in rows]


def children(pid):
    """Processes below `pid` with their states; Z is a zombie."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid:
            found += [(int(stat.parent.name), state), *children(int(stat.parent.name))]
    return found


def test_verdicts_are_those_of_math_verify():
    rows = json.loads((HERE / "math_pairs.json").read_text())
    assert len(rows) >= 500 and 0.3 < sum(row["equal"] for row in rows) / len(rows) < 0.8
    with MathPool(num_workers=2, timeout_s=20) as patient:
        verdicts = patient.verify([(row["text"], row["gold"]) for row in rows])
    assert [(row["text"], verdict) for row, verdict in zip(rows, verdicts)] == [(r["text"], r["equal"]) for r in rows]
    assert patient.num_timeouts == patient.num_crashes == 0


def test_hostile_answers_end_in_time_from_any_thread(pool):
    answers = hostile()
    assert len(answers) >= 50
    pool.verify([("4", "4")] * 8)

    def attempt(answer):
        start = time.monotonic()
        verdict = pool.verify([(answer, "4")])[0]
        return verdict, time.monotonic() - start

    before = pool.num_timeouts
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(attempt, answers))
    slow = [(answer[:40], seconds) for answer, (_, seconds) in zip(answers, found) if seconds > TIMEOUT_S + 0.5]
    assert not slow
    assert pool.num_timeouts - before >= 10, "the hostile answers have become harmless"
    assert pool.num_timeouts - before + pool.num_crashes >= sum(verdict is None for verdict, _ in found)
    right = [answer[:40] for answer, (verdict, _) in zip(answers, found) if verdict]
    assert all(answer.startswith(("= ", "the answer is ")) for answer in right), right
    assert pool.verify([("4", "4"), ("5", "4")]) == [True, False], "replaced judges judge"
    assert not Path("/tmp/step3vl-hostile-math").exists()


def test_others_are_unaffected_and_nobody_stays(pool):
    hang = hostile()[0]
    pairs = [(f"\\boxed{{{k}}}", "7") for k in range(20)]
    for place in (3, 9, 10, 15):
        pairs[place] = (hang, "7")
    verdicts = pool.verify(pairs)
    assert [k for k, verdict in enumerate(verdicts) if verdict is None] == [3, 9, 10, 15]
    assert [k for k, verdict in enumerate(verdicts) if verdict] == [7]
    family = children(pool._nursery.pid)
    assert len(family) == 4 and all(state != "Z" for _, state in family), family


def test_a_judge_that_dies_is_replaced(pool):
    for pid, _ in children(pool._nursery.pid):
        os.kill(pid, signal.SIGKILL)
    crashes = pool.num_crashes
    first = pool.verify([("4", "4")] * 4)
    assert first == [None] * 4 and pool.num_crashes == crashes + 4, "an answer whose judge was shot is not judged"
    assert pool.verify([("4", "4")] * 8) == [True] * 8
    assert all(state != "Z" for _, state in children(pool._nursery.pid))


def test_judges_are_renewed_before_they_grow(pool, monkeypatch):
    monkeypatch.setattr(math_pool, "ANSWERS_A_JUDGE", 3)
    before = {pid for pid, _ in children(pool._nursery.pid)}
    assert pool.verify([("4", "4")] * 30) == [True] * 30
    assert not before & {pid for pid, _ in children(pool._nursery.pid)}


def test_memory_is_capped():
    with MathPool(num_workers=1, timeout_s=1, memory_mb=300) as small:
        assert small.verify([("$2^{10000000000}$", "4"), ("4", "4")]) in ([None, True], [False, True])
        limits = Path(f"/proc/{children(small._nursery.pid)[0][0]}/limits").read_text()
        assert next(line for line in limits.splitlines() if "address space" in line).split()[3] == str(300 << 20)


def test_what_is_not_read(pool):
    answers = ["", "   ", "x" * (1 << 20), "4" * (MAX_CHARACTERS + 1), "<think>4", "<think>4</think>"]
    start = time.monotonic()
    assert pool.verify([(answer, "4") for answer in answers]) == [False] * len(answers)
    assert time.monotonic() - start < 2, "it was read"
    assert pool.verify([("<think>5</think> \\boxed{4}", "4"), ("<think>4</think> \\boxed{5}", "4")]) == [True, False]
    assert pool.verify([("$(1,2)$", "(1,2)"), ("$(1,2)$", "$(1,2)$")]) == [True, True], "gold is read as LaTeX"
    assert pool.verify([]) == []


def test_processes_end_with_the_pool():
    pool = MathPool(num_workers=3)
    nursery = pool._nursery.pid
    family = [pid for pid, _ in children(nursery)]
    assert len(family) == 3
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in [nursery, *family])
    with pytest.raises(ValueError, match="num_workers >= 1"):
        MathPool(num_workers=0)


def test_shared_pool_in_threads_and_at_exit():
    code = """
import threading
from step3vl.evaluation.math_pool import verify
found = []
threads = [threading.Thread(target=lambda: found.append(verify([("$1/2$", "0.5"), ("3", "4")]))) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str([[True, False]] * 4), done.stderr


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"pip install 'step3vl\[rl\]'"):
        MathPool()


def test_an_interrupted_caller_leaves_a_working_pool(pool, monkeypatch):
    """An exception in the middle of waiting: busy judges are replaced, not handed on with another's answer."""
    original = math_pool.selectors.DefaultSelector

    class Interrupted(original):
        def select(self, timeout=None):
            raise KeyboardInterrupt

    monkeypatch.setattr(math_pool.selectors, "DefaultSelector", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.verify([("4", "4")] * 3)
    monkeypatch.undo()
    assert pool.verify([("5", "4"), ("4", "4")] * 4) == [False, True] * 4


def test_module_function_is_the_pool():
    assert verify([("\\boxed{\\frac{3}{6}}", "0.5")]) == [True]
    assert threading.active_count() >= 1 and math_pool._shared[os.getpid()].timeout_s == 5.0
