"""Where the rows of a block lie on disk, in scratch files that are mapped into memory.

So the index is pages of files, which the system may write out and drop, and no memory of the
process. It is made anew from a save when a run goes on. A block that has few rows yet is hashed;
once that would take as much as a place for every row of the block, there is one.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stem_jax.tables.row_places import LOAD, RowPlaces

_NUMBER_BYTES = 4
_FEWEST = 2**16
_PIECE = 2**18


class DiskIndex:
    """The place of each row that is on disk. Not for several threads at once."""

    def __init__(self, folder: Path, num_rows: int, needed: int = 0):
        """
        Args:
            folder: of the scratch files; those of another index in it are removed.
            num_rows: of the block.
            needed: rows that it will have at least.

        Raises:
            OSError: the disk is full.
        """
        self._folder = folder
        self._num_rows = num_rows
        for name in os.listdir(folder):
            if name.startswith("index-"):
                (folder / name).unlink()
        self._generation = 0
        self._files: list[Path] = []
        # By row, the place + 1, or 0; None while rows are hashed.
        self._direct: np.ndarray | None = None
        self._hashed: RowPlaces | None = None
        self._count = 0
        self._allocate(max(needed, _FEWEST))

    @property
    def count(self) -> int:
        """Rows that have a place."""
        return self._count if self._hashed is None else self._hashed.count

    @property
    def num_bytes(self) -> int:
        """Of the scratch files."""
        return sum(path.stat().st_size for path in self._files)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """[n] int64, the places of rows [n]; -1 where a row is not on disk."""
        if self._hashed is not None:
            return self._hashed.find(rows)
        assert self._direct is not None
        return self._direct[rows].astype(np.int64) - 1

    def reserve(self, count: int) -> None:
        """Makes room for so many more rows.

        Raises:
            OSError: the disk is full; nothing has changed.
        """
        if self._hashed is None or self._hashed.count + count <= self._hashed.most:
            return
        hashed, files, generation = self._hashed, self._files, self._generation
        try:
            self._allocate(max(2 * hashed.most, hashed.count + count))
        except OSError:
            for path in self._files:
                path.unlink(missing_ok=True)
            self._hashed, self._direct, self._files = hashed, None, files
            self._generation = generation
            raise
        self._count = 0
        for rows, places in hashed.pieces():
            self.put(rows, places)
        for path in files:
            path.unlink()

    def put(self, rows: np.ndarray, places: np.ndarray) -> None:
        """Gives distinct rows [n] their places [n]; `reserve` has made room for new ones."""
        if self._hashed is not None:
            self._hashed.put(rows, places)
            return
        assert self._direct is not None
        self._count += int(np.count_nonzero(self._direct[rows] == 0))
        self._direct[rows] = np.asarray(places, np.int32) + 1

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows and their places, int32, some at a time; ascending if `is_sorted`."""
        if self._hashed is not None:
            yield from self._hashed.pieces()
            return
        assert self._direct is not None
        for first in range(0, self._num_rows, _PIECE):
            piece = self._direct[first : first + _PIECE]
            rows = np.flatnonzero(piece)
            yield (rows + first).astype(np.int32), piece[rows] - 1

    @property
    def is_sorted(self) -> bool:
        """Whether `pieces` come by row."""
        return self._hashed is None

    def close(self) -> None:
        """Removes the scratch files. What is mapped takes disk until nobody has it."""
        for path in self._files:
            path.unlink(missing_ok=True)
        self._hashed = self._direct = None

    def _allocate(self, most: int) -> None:
        self._generation += 1
        self._files = []
        if 2 * most / LOAD >= self._num_rows:
            self._hashed = None
            self._direct = self._mapped("direct", max(1, self._num_rows))
        else:
            self._hashed = RowPlaces(most, self._mapped)

    def _mapped(self, name: str, size: int) -> np.ndarray:
        path = self._folder / f"index-{self._generation}-{name}"
        self._files.append(path)
        return mapped_zeros(path, size)


def mapped_zeros(path: Path, size: int, dtype: type = np.int32) -> np.ndarray:
    """A new file of zeros, mapped: [size] that may be written to.

    Raises:
        OSError: the disk is full.
    """
    num_bytes = size * np.dtype(dtype).itemsize
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        # A page of a file with holes that finds no room when it is written to kills the process.
        os.posix_fallocate(file, 0, num_bytes)
        mapped = mmap.mmap(file, num_bytes)
    finally:
        os.close(file)
    return np.frombuffer(mapped, dtype)
