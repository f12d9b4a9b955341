"""How a process treats the memory of tensors that it has freed."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Keep what freed tensors leave for the next ones, in the whole process from now on.

    glibc maps every large block anew and unmaps it when it is freed, so that each activation of each step is paid for in
    page faults and in pages that the kernel fills with zeros: 120,000 faults and a quarter of the time of a training step of
    efficientnet-b0 on two cores (docs/results.md). With this the process stays as large as it once was. Does nothing where
    another C library or allocator is in charge, or where the environment has its own settings for malloc.
    """
    own_settings = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not own_settings:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
