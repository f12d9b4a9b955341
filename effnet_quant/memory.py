"""Settings of malloc for the memory of freed tensors."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for later ones, in the whole process, from now on.

    By default glibc maps every large block and unmaps it when it is freed. So each activation of each step costs page
    faults, and the kernel fills its pages with zeros. This took 120,000 faults and a quarter of the time of a training step
    of efficientnet-b0 on two cores (docs/results.md). The price is that the process never shrinks.

    Does nothing with another C library or allocator, or if the environment has its own settings for malloc.
    """
    own_settings = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not own_settings:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
