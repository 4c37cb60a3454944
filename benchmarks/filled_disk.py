"""A table on disk of which every row was written, cold, and what the storage gave since."""

import os
import time
from pathlib import Path

import numpy as np

from stem_jax.tables.disk_store import DiskStore

# Rows that are written at a time.
_PIECE = 2**16


def filled(store: DiskStore, folder: Path) -> dict[str, float]:
    """Writes every row once, keeps all under a name and drops them from the page cache.

    Args:
        store: of one block, without rows.
        folder: that has its files, at any depth.
    """
    [block] = store.blocks
    rng = np.random.default_rng(0)
    values = {
        name: (0.01 * rng.standard_normal((_PIECE, *array.shape[1:]))).astype(array.dtype)
        for name, array in block.arrays.items()
    }
    start = time.perf_counter()
    for first in range(0, len(block.row_range), _PIECE):
        rows = np.arange(first, min(first + _PIECE, len(block.row_range)))
        store.write(block, rng.permutation(rows), values)
    written = time.perf_counter()
    store.save("all")
    store.keep(["all"])
    saved = time.perf_counter()
    for path in folder.glob("**/*.rows"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {
        "fill_seconds": round(written - start, 1),
        "save_seconds": round(saved - written, 1),
        "disk_gib": round(store.disk_bytes / 2**30, 2),
    }


def fetched_bytes() -> int:
    """That the storage has given to this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
