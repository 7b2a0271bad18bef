"""Start a jail, feed it, read it through capped pipes, keep the clock, and never believe the program about itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .harness import packed, unpacked
from .isolation import missing_isolation
from .outcome import Limits, Outcome, Status
from .places import INSIDE, package_folders, package_place, places
from .syscalls import filter_program

MAX_CODE_BYTES = 1_000_000
START_S = 20.0  # to build a jail on a busy machine; the program's own clock starts after it
GRACE_S = 2.0  # between letting the leash go and killing whoever is left
_HERE = Path(__file__).parent
_START = "__import__('sys').path.append({place!r}); exec(compile(open({program!r}).read(), {program!r}, 'exec'))"


def run(
    code: str,
    stdin: str = "",
    limits: Limits | None = None,
    allow_unisolated: bool = False,
    packages: Sequence[str] = (),
) -> Outcome:
    """Run a program as a script and return what it printed.

    The program sees the standard library and `packages` (of PACKAGES, read-only), an empty folder, no environment, no
    network and none of this machine's files but the interpreter's. `status` is "refused" for code that is no text or
    above 1 MB. Safe in any thread.

    Raises:
        RuntimeError: the machine cannot isolate, unless `allow_unisolated`; or building the jail failed.
        ValueError: a package that is not installed, or not one that programs may have.
    """
    limits = limits or Limits()
    if refusal := _refuse(code) or _refuse(stdin, 64 * MAX_CODE_BYTES):
        return refusal
    return _execute(code, stdin.encode(), None, limits, _isolate(allow_unisolated), package_folders(packages))


def call(
    code: str,
    function_name: str,
    arguments_list: Sequence[Sequence[Any]],
    limits: Limits | None = None,
    allow_unisolated: bool = False,
    packages: Sequence[str] = (),
) -> list[Outcome]:
    """Call a program's function once for each row of positional arguments, each in a fresh jail.

    Arguments and values are numbers, text, None, lists, tuples, sets and dictionaries of them. Compare `outcome.value`
    with the expected value here, never inside.
    `function_name` may be dotted: "Solution.two_sum" makes a Solution and calls its method. `limits` hold for each.

    Raises:
        RuntimeError: as `run`.
        ValueError: as `run`, and for arguments of another kind.
    """
    limits, isolated, folders = limits or Limits(), _isolate(allow_unisolated), package_folders(packages)
    path = [package_place(folders, isolated)] if folders else []
    if refusal := _refuse(code):
        return [refusal] * len(arguments_list)
    outcomes = []
    for arguments in arguments_list:
        nonce = secrets.token_hex(16)
        try:
            job = {"code": code, "function": function_name, "arguments": packed(list(arguments)), "nonce": nonce}
        except TypeError as error:
            raise ValueError(f"call: arguments of {function_name} must be plain values: {error}") from error
        text = json.dumps(job | {"path": path})
        outcomes.append(_execute((_HERE / "harness.py").read_text(), b"", (nonce, text), limits, isolated, folders))
    return outcomes


def _isolate(allow_unisolated: bool) -> bool:
    missing = missing_isolation()
    if missing and not allow_unisolated:
        raise RuntimeError(
            f"this machine cannot isolate model-written programs, so none is run: {'; '.join(missing)}. Use a machine "
            "with user namespaces, or pass allow_unisolated=True if whatever the program does here is acceptable."
        )
    return not missing


def _refuse(text: str, max_bytes: int = MAX_CODE_BYTES) -> Outcome | None:
    try:
        size = len(text.encode())
        reason = f"{size:,} bytes, at most {max_bytes:,} are run" if size > max_bytes else ""
    except UnicodeEncodeError:
        reason = "it holds half of a surrogate pair, so it is no text"
    return Outcome(stdout="", stderr=f"refused: {reason}", status="refused", seconds=0.0) if reason else None


def _execute(
    code: str,
    stdin: bytes,
    harness: tuple[str, str] | None,
    limits: Limits,
    isolated: bool,
    packages: dict[str, str] | None = None,
) -> Outcome:
    """One jail from beginning to end. `harness`: nonce of the value and the job as JSON, for `call`."""
    python, nonce = os.path.realpath(getattr(sys, "_base_executable", sys.executable)), secrets.token_hex(16)
    names = ("stdout", "stderr", "status", *(["value"] if harness else []))
    with contextlib.ExitStack() as stack:
        folder = "/" if isolated else stack.enter_context(_folder(code))
        job: dict[str, Any] = {
            "nonce": nonce,
            "isolated": isolated,
            "limits": asdict(limits),
            "filter": (filter_program() or b"").hex(),
            "files": {"program.py": code},
            "argv": [python, "-I", "-S", "/program.py" if isolated else f"{folder}/../program.py"],
            "packages": {f"{INSIDE}/{name}": place for name, place in (packages or {}).items()},
        } | places(python)
        if packages and harness is None:
            job["argv"][-1:] = ["-c", _START.format(place=package_place(packages, isolated), program=job["argv"][-1])]
        leash = _Ends(stack)
        pipes = {name: _Ends(stack) for name in names}
        inherited = [_sealed(json.dumps(job).encode(), stack), pipes["status"].write, leash.read]
        inherited += [_sealed(harness[1].encode(), stack), pipes["value"].write] if harness else []
        process = subprocess.Popen(
            [python, "-I", "-S", str(_HERE / "jail.py"), *map(str, inherited)],
            stdin=_sealed(stdin, stack),
            stdout=pipes["stdout"].write,
            stderr=pipes["stderr"].write,
            pass_fds=inherited,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        stack.callback(_end, process)
        stack.callback(leash.close)  # whatever happens here, the jail ends
        for ends in pipes.values():
            ends.close()
        heard, stopped, started = _listen({name: ends.read for name, ends in pipes.items()}, leash, nonce, limits)
    return _judge(heard, stopped, started, nonce, harness[0] if harness else None, limits)


def _listen(
    ears: dict[str, int], leash: _Ends, nonce: str, limits: Limits
) -> tuple[dict[str, bytearray], str, float | None]:
    """Read until every pipe ends; let the leash go at the deadline or the cap. What was read, why it was stopped."""
    cap, heard, stopped = limits.output_kb * 1024, {name: bytearray() for name in ears}, ""
    started, deadline = None, time.monotonic() + START_S
    with selectors.DefaultSelector() as selector:
        for name, fd in ears.items():
            selector.register(fd, selectors.EVENT_READ, name)
        while selector.get_map():
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if piece := os.read(key.fd, 1 << 16):
                    kept = heard[key.data]
                    kept += piece[: cap + 1 - len(kept)]
                    stopped = stopped or ("output" if len(kept) > cap else "")
                else:
                    selector.unregister(key.fd)
            if started is None and nonce.encode() in heard["status"]:
                started = time.monotonic()
                deadline = started + limits.wall_s
            late = time.monotonic() >= deadline
            if late and leash.closed:
                break
            if (late or stopped) and not leash.closed:
                stopped = stopped or "timeout"
                leash.close()
                deadline = time.monotonic() + GRACE_S
    return heard, stopped, started


def _end(process: subprocess.Popen) -> None:
    """Wait for the warden, whose leash is gone; kill it if it does not go."""
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judge(
    heard: dict[str, bytearray],
    stopped: str,
    started: float | None,
    nonce: str,
    value_nonce: str | None,
    limits: Limits,
) -> Outcome:
    facts: dict[str, Any] = {}
    for line in heard["status"].decode(errors="replace").splitlines():
        if line.startswith(nonce):
            facts |= json.loads(line[len(nonce) :])
    if "error" in facts or started is None:
        raise RuntimeError(f"the sandbox could not be built: {facts.get('error', 'it did not start in time')}")
    cap = limits.output_kb * 1024
    stdout, stderr = (bytes(heard[name][:cap]).decode(errors="replace") for name in ("stdout", "stderr"))
    seconds, value = facts.get("seconds", time.monotonic() - started), None
    status: Status = "ok"
    if stopped:
        status = "timeout" if stopped == "timeout" else "output"
        limit = f"{limits.wall_s:g} s" if status == "timeout" else f"{limits.output_kb} KB of output"
        stderr += f"\nstopped: more than {limit}"
    elif facts.get("memory") or (facts.get("exit") != 0 and re.match(r"[\w.]*MemoryError\b", _last_line(stderr))):
        status = "memory"
    elif facts.get("exit") in (-signal.SIGKILL, -signal.SIGXCPU) and facts["cpu"] >= limits.cpu_s * 0.95:
        status = "timeout"
        stderr += f"\nstopped: more than {limits.cpu_s:g} s of processor time"
    elif facts.get("exit") != 0:
        status = "crash"
    elif value_nonce is not None:
        status, value = _value(heard["value"], value_nonce)
    return Outcome(stdout=stdout, stderr=stderr.strip("\n"), status=status, seconds=seconds, value=value)


def _value(heard: bytearray, nonce: str) -> tuple[Status, Any]:
    """The one value that stands behind the nonce; anything else is a crash."""
    line = bytes(heard).partition(b"\n")[0]
    if not line.startswith(nonce.encode()):
        return "crash", None
    try:
        return "ok", unpacked(json.loads(line[len(nonce) :]))
    except (ValueError, TypeError, RecursionError):
        return "crash", None


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


@contextlib.contextmanager
def _folder(code: str) -> Iterator[str]:
    """Without a jail: an empty folder to run in, the program beside it."""
    with tempfile.TemporaryDirectory(prefix="step3vl-program-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_text(code)
        Path(folder, "work").mkdir()
        yield f"{folder}/work"


class _Ends:
    """The two ends of a pipe, each closed once."""

    def __init__(self, stack: contextlib.ExitStack):
        self.read, self.write = os.pipe()
        self.closed = False
        stack.callback(self._close_all)

    def close(self) -> None:
        """Close the end that is written."""
        if not self.closed:
            self.closed = True
            os.close(self.write)

    def _close_all(self) -> None:
        self.close()
        os.close(self.read)


def _sealed(data: bytes, stack: contextlib.ExitStack) -> int:
    """A file descriptor that reads `data` and cannot be written by whoever inherits it."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
