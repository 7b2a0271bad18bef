"""Stand-alone: build a jail from namespaces, start a program in it, watch it, report how it ended.

Run as `python -I -S jail.py JOB STATUS LEASH [HARNESS VALUE]`, all file descriptors. Three processes: the warden
(outside; ends the jail when its leash is let go), the init (process 1 of the jail; owns its mounts, counts its memory)
and the program (another user without rights, another user namespace, a filter on its system calls). When the init
ends, the kernel kills every process in the jail: that is what a pid namespace promises.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time

MOUNTS, UTS, IPC, USER, PIDS, NET = 0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000  # CLONE_NEW*
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18  # MS_*
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
DEATH_SIGNAL, DUMPABLE, SECCOMP, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38  # PR_SET_*
NOBODY = 65534
POLL_S = 0.05
LIBC = ctypes.CDLL(None, use_errno=True)


def main():
    job_fd, status, leash, *channel = map(int, sys.argv[1:])
    with os.fdopen(job_fd, "rb") as file:
        job = json.loads(file.read())
    try:
        as_root = enter_namespaces() if job["isolated"] else False
        if not job["isolated"]:
            check(LIBC.prctl(SUBREAPER, 1, 0, 0, 0), "subreaper")
        init = os.fork()
    except OSError as error:
        report(status, job, error=str(error))
        return
    if init == 0:
        try:
            inside(job, status, leash, channel, as_root)
        except BaseException as error:
            report(status, job, error=f"{type(error).__name__}: {error}")
        os._exit(0)
    for fd in (1, 2, status, *channel):
        os.close(fd)
    select.select([leash, os.pidfd_open(init)], [], [])
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)
    with contextlib.suppress(ChildProcessError):  # orphans come here when there is no pid namespace to end them
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            os.waitpid(-1, 0)


def inside(job, status, leash, channel, as_root):
    """The init: mounts, then the program, then its end."""
    os.close(leash)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 cannot be signalled from inside, unless it has handlers
    check(LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "death signal")
    check(LIBC.prctl(DUMPABLE, 0, 0, 0, 0), "not dumpable")  # its memory holds the nonce
    if job["isolated"]:
        build_root(job)
    program = os.fork()
    if program == 0:
        try:
            become_program(job, channel, as_root)
        except BaseException as error:
            report(status, job, error=f"{type(error).__name__}: {error}")
        os._exit(0)
    for fd in (1, 2, *channel):
        os.close(fd)
    report(status, job, started=True)
    watch(program, job, status)


def watch(program, job, status):
    """Wait for the program, bury orphans, end all of them when together they hold too much memory."""
    woken, start, ceiling, memory = os.pidfd_open(program), time.monotonic(), job["limits"]["memory_mb"] << 10, False
    while True:
        select.select([woken], [], [], POLL_S)
        while True:
            pid, how, usage = os.wait4(-1, os.WNOHANG)
            if pid == program:
                code, cpu = os.waitstatus_to_exitcode(how), usage.ru_utime + usage.ru_stime
                report(status, job, exit=code, cpu=cpu, seconds=time.monotonic() - start, memory=memory)
                return
            if pid == 0:
                break
        if not memory and resident_kb(program, job["isolated"]) > ceiling:
            memory = True
            os.kill(-1 if job["isolated"] else program, signal.SIGKILL)


def resident_kb(program, isolated):
    """Memory of the jail's processes, shared pages counted once."""
    pids = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"] if isolated else [str(program)]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
            total += next((int(line.split()[1]) for line in file if line.startswith("Pss:")), 0)
    return total


def enter_namespaces():
    """True: as root with rights, so that the program can become another user. False: inside a new user namespace."""
    flags = MOUNTS | UTS | IPC | PIDS | NET
    if os.geteuid() == 0 and LIBC.unshare(flags) == 0:
        return True
    enter_user_namespace(inside_id=0)
    check(LIBC.unshare(flags), "mount, pid, network, ipc and uts namespaces")
    return False


def enter_user_namespace(inside_id):
    user, group = os.geteuid(), os.getegid()
    check(LIBC.unshare(USER), "user namespace")
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{inside_id} {user} 1")
    write("/proc/self/gid_map", f"{inside_id} {group} 1")


def build_root(job):
    """A root in memory where only what is named here exists, all of it read-only but /tmp."""
    mount("", "/", "", PRIVATE | RECURSIVE)
    mount("jail", "/tmp", "tmpfs", NO_SUID, "size=4m,mode=755")
    os.mkdir("/tmp/outside")
    check(LIBC.syscall(PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/outside"), "new root")
    os.chdir("/")
    for folder in ("/etc", "/dev", "/proc", "/tmp"):
        os.mkdir(folder)
    for folder in job["folders"]:
        source = "/outside" + folder
        if os.path.islink(source):
            os.symlink(os.readlink(source), folder)
        elif os.path.isdir(source) and not os.path.isdir(folder):
            os.makedirs(folder)
            mount(source, folder, "", BIND | RECURSIVE)
            read_only(folder, NO_SUID | NO_DEV)
    for folder in job["hidden"]:
        if os.path.isdir(folder):
            mount("hidden", folder, "tmpfs", READ_ONLY | NO_SUID | NO_DEV, "size=4k,mode=755")
    for folder, source in job["packages"].items():
        os.makedirs(folder)
        mount("/outside" + source, folder, "", BIND | RECURSIVE)
        read_only(folder, NO_SUID | NO_DEV)
    for file in (job["argv"][0], "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        if os.path.exists("/outside" + file):
            os.makedirs(os.path.dirname(file), exist_ok=True)
            write(file, "")
            mount("/outside" + file, file, "", BIND)
            read_only(file, NO_SUID)
    mount("proc", "/proc", "proc", NO_SUID | NO_DEV | NO_EXEC)
    mount("tmp", "/tmp", "tmpfs", NO_SUID | NO_DEV, f"size={job['limits']['file_mb']}m,nr_inodes=4096,mode=1777")
    os.symlink("/proc/self/fd", "/dev/fd")
    os.symlink("/tmp", "/dev/shm")
    for name, text in job["files"].items():
        write(f"/{name}", text)
        os.chmod(f"/{name}", 0o444)
    check(LIBC.umount2(b"/outside", 2), "leaving the old root")
    os.rmdir("/outside")
    read_only("/", NO_SUID, recursive=False)
    os.chdir("/tmp")


def become_program(job, channel, as_root):
    """Shed user, rights, limits and file descriptors, then become the program; never returns."""
    os.setsid()
    if as_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    check(LIBC.prctl(DUMPABLE, 1, 0, 0, 0), "dumpable")  # or its own /proc/self would be closed to it
    if job["isolated"]:
        enter_user_namespace(inside_id=NOBODY)  # processes are counted for each user namespace
    for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in channel], 3):
        os.dup2(fd, target)
    os.closerange(3 + len(channel), 1 << 20)
    set_limits(job["limits"])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    set_filter(bytes.fromhex(job["filter"]))
    environment = {"HOME": os.getcwd(), "TMPDIR": os.getcwd(), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    if job["packages"]:
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each thread has its memory
    os.execve(job["argv"][0], job["argv"], environment)


def set_limits(limits):
    megabyte, cpu = 1 << 20, -int(-limits["cpu_s"] // 1)
    for name, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, limits["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte),
        (resource.RLIMIT_STACK, 8 * megabyte),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, limits["num_processes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def set_filter(code):
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    check(LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    if code:
        check(LIBC.prctl(SECCOMP, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0), "filter of system calls")


def mount(source, target, kind, flags, data=""):
    encoded = [text.encode() for text in (source, target, kind)]
    check(LIBC.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount on {target}")


def read_only(target, more, recursive=True):
    """Adds to the flags of the mount at `target`, and of those below it."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | more, 0, 0, 0)
    call = (MOUNT_SETATTR, -100, target.encode(), 0x8000 if recursive else 0, ctypes.byref(attributes))
    check(LIBC.syscall(*call, ctypes.c_size_t(32)), f"read-only mount of {target} (needs Linux 5.12)")


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def check(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def report(status, job, **facts):
    """One line to the parent; the nonce is known to nobody in the jail but the init."""
    os.write(status, (job["nonce"] + json.dumps(facts) + "\n").encode())


if __name__ == "__main__":
    main()
