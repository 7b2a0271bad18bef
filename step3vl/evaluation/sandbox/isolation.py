"""What this machine can promise: a small program tries to get out of a jail once, and says what it could do."""

from __future__ import annotations

import functools
import json
import os
import sys

_ESCAPES = """
import json, os, socket, sys
can = []
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
if os.getpid() > 50 or len([p for p in os.listdir("/proc") if p.isdigit()]) > 5:
    can.append("see processes outside (no pid namespace)")
if int(status["CapEff"], 16):
    can.append("keep the rights of root")
if status["NoNewPrivs"].strip() != "1" or status["Seccomp"].strip() != "2":
    can.append("make any system call (no filter: the machine is neither x86_64 nor aarch64, or seccomp is off)")
known = {"bin", "sbin", "lib", "lib32", "lib64", "usr", "etc", "dev", "proc", "tmp", "program.py"}
if more := set(os.listdir("/")) - known - {sys.base_prefix.split("/")[1]}:
    can.append(f"see folders outside: {sorted(more)}")
for path in ("/usr/x", "/x", "/dev/x", sys.base_prefix + "/x"):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        can.append(f"write {path}")
    except OSError:
        pass
for _, place, _, flags, *_ in map(str.split, open("/proc/mounts")):
    if place not in ("/tmp", "/proc") and "ro" not in flags.split(","):
        can.append(f"write below {place}, were it another user")
if [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]] not in ([], ["lo"]):
    can.append("reach the network (no network namespace)")
children = []
try:
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            os.read(os.pipe()[0], 1)
        children.append(pid)
    can.append("start more processes than allowed")
except OSError:
    pass
for pid in children:
    os.kill(pid, 9)
print(json.dumps(can))
"""


@functools.cache
def missing_isolation() -> tuple[str, ...]:
    """Why programs cannot be isolated here, a sentence each; empty where they can. Tried once a process."""
    from .execute import _execute
    from .outcome import Limits
    from .syscalls import filter_program

    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return (f"namespaces need Linux 5.12, this is {sys.platform}",)
    if filter_program() is None:
        return (f"no filter of system calls is known for a {os.uname().machine} machine",)
    try:
        outcome = _execute(_ESCAPES, b"", None, Limits(num_processes=8), isolated=True)
        if outcome.status == "ok":
            return tuple(f"a program can {what}" for what in json.loads(outcome.stdout))
        return (f"the probe ended with {outcome.status}: {outcome.stderr.strip()[-300:]}",)
    except (RuntimeError, OSError) as error:
        return (str(error),)


def is_isolated() -> bool:
    """True where programs run in namespaces of their own, as another user, behind limits and a filter."""
    return not missing_isolation()
