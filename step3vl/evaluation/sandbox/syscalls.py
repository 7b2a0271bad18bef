"""A seccomp filter as bytes: the system calls that a sandboxed program is denied. Built here, installed by jail.py.

Namespaces and limits already stop what these calls are for; the filter closes what limits do not count (memory
without an owner: memfd, System V segments) and keeps a program away from kernel interfaces that no answer needs.
"""

from __future__ import annotations

import platform
import struct

_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ARCHITECTURE, _NUMBER, _FIRST_ARGUMENT = 4, 0, 16  # offsets in struct seccomp_data
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag
_X32 = 0x40000000

# name: (x86_64, aarch64), from the kernel's tables
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "userfaultfd": (323, 282),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "pidfd_getfd": (438, 438),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, audit name, clone


def filter_program() -> bytes | None:
    """The filter as an array of struct sock_filter; None on a machine whose call numbers are not known here."""
    if platform.machine() not in _MACHINES:
        return None
    column, architecture, clone = _MACHINES[platform.machine()]

    def deny_if(test: int, operand: int, verdict: int) -> list[tuple[int, int, int, int]]:
        return [(test, 0, 1, operand), (_RETURN, 0, 0, verdict)]

    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    code += deny_if(_AT_LEAST, _X32, _EPERM)
    for numbers in _DENIED.values():
        code += deny_if(_EQUAL, numbers[column], _EPERM)
    code += deny_if(_EQUAL, 435, _ENOSYS)  # clone3 hides its flags from filters; libc falls back to clone
    code += [(_EQUAL, 0, 2, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 1, 0, _NEW_NAMESPACES)]
    code += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
