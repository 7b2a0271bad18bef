"""Keeps freed memory in the process instead of giving it back to the system after every image.

Decoders ask for buffers of megabytes and free them at once. By default glibc maps and unmaps such buffers, so that
every image pays again for fresh zeroed pages; that is often as costly as the decoding.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of glibc's <malloc.h>
SETTINGS = {
    M_MMAP_THRESHOLD: ("MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold", 512 * 2**20),
    M_TRIM_THRESHOLD: ("MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold", 2**30),
}
"""Parameter -> (environment variable, name in GLIBC_TUNABLES, our value in bytes): buffers up to 512 MiB come from the
heap, and up to 1 GiB of free memory stays at its end."""
LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""The most that an older glibc accepts."""


def has_glibc() -> bool:
    """Whether this process allocates with glibc, which alone has these settings."""
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def keep_freed_memory() -> bool:
    """Raise glibc's two thresholds in this process, at once and for its forked children; True when both are raised.

    A threshold that the user has set, by MALLOC_..._THRESHOLD_ or GLIBC_TUNABLES, stays as it is. Without glibc nothing
    happens. The process may hold up to 1 GiB that it no longer uses.
    """
    if not has_glibc():
        return False
    libc, tunables = ctypes.CDLL(None), os.environ.get("GLIBC_TUNABLES", "")
    raised = []
    for parameter, (variable, tunable, value) in SETTINGS.items():
        if variable in os.environ or tunable in tunables:
            raised.append(False)
        else:
            smaller = min(value, LARGEST_MMAP_THRESHOLD)
            raised.append(bool(libc.mallopt(parameter, value) or libc.mallopt(parameter, smaller)))
    return all(raised)


def worker_init(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: workers that are not forked start with glibc's defaults."""
    keep_freed_memory()
