"""Memory that a training on CPUs keeps from step to step.

A step's buffers are large, and glibc gives large blocks back to the system as soon as they are
free: each step takes them anew, and the system clears every page. At the size of configs/tiny.py
that is 500 MB and a third of a step's time. The price is memory: what was free once stays with the
process, which is then some 1 GB larger.
"""

import ctypes
import os
import sys
from pathlib import Path

# Of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1
# Whoever sets one of them has chosen.
_SETTINGS = (
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
)
_ACCELERATORS = ("nvidia*", "nvhost*", "nvmap", "dxg", "accel*", "vfio/[0-9]*", "kfd")


def keep_freed_memory() -> bool:
    """Call it before JAX is imported: threads that were started keep their own ways.

    Returns whether anything was set: not without glibc, beside accelerators, whose buffers are not
    in this memory, or where the environment says how memory is to be treated.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    chosen = any(name in os.environ for name in _SETTINGS)
    if chosen or any(any(Path("/dev").glob(name)) for name in _ACCELERATORS):
        return False
    # Other arenas than the first one cannot hold a large block.
    return all(
        libc.mallopt(option, value)
        for option, value in (
            (_ARENA_MAX, 1),
            (_MMAP_MAX, 0),
            (_TRIM_THRESHOLD, _NEVER),
        )
    )
