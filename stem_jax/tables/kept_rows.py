"""Which rows of a block lie in its arrays, and where: those that were written, as they came.

Hashed keys ask for few of a table's rows, and for most of these late. A row that nobody has written
is not kept: it is made again whenever it is asked for. Rows that are kept lie at the first places
of arrays that have room for all rows, of which the system provides what has been written to.
"""

import contextlib
import mmap
import sys
import threading

import numpy as np

from stem_jax.tables.row_index import RowIndex

_FEWEST = 1024
# Python 3.11 has no name for it.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


class KeptRows:
    """Places of the rows of a block. Methods may run in several threads at once.

    Attributes:
        numbers: [num_rows] int32, the row at each place, of the first `count`.
        count: rows that are kept.
    """

    def __init__(self, num_rows: int):
        self.numbers = reserved((num_rows,), np.int32)
        self.count = 0
        self._num_rows = num_rows
        self._lock = threading.Lock()
        self._index, self._places = self._empty_index(_FEWEST)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """[n] int64, the places of rows [n] int64; -1 where one is not kept."""
        with self._lock:
            return self._places[self._index.find(rows)].astype(np.int64)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """[n] int64, the places of distinct rows [n] int64, which are kept from now on."""
        with self._lock:
            found = self._index.find(rows)
            new = self._places[found] < 0
            fresh = rows[new]
            if len(fresh):
                if not self._index.has_room(len(fresh)):
                    self._grow(len(fresh))
                    found = self._index.find(rows)
                self._enter(fresh, self.count)
                self.numbers[self.count : self.count + len(fresh)] = fresh
                self.count += len(fresh)
                found = self._index.find(rows)
            return self._places[found].astype(np.int64)

    def keep_all(self) -> None:
        """Every row is kept, at its own number; none was before."""
        with self._lock:
            assert not self.count, "rows lie elsewhere"
            self._index, self._places = self._empty_index(self._num_rows)
            self.numbers[:] = np.arange(self._num_rows, dtype=np.int32)
            self._enter(np.arange(self._num_rows), 0)
            self.count = self._num_rows

    def _enter(self, rows: np.ndarray, first: int) -> None:
        index = self._index
        entries = index.find(rows)
        unknown = entries == index.absent
        entries[unknown] = index.add(rows[unknown])
        self._places[entries] = np.arange(first, first + len(rows), dtype=np.int32)

    def _grow(self, more: int) -> None:
        """Twice the room, or more."""
        self._index, self._places = self._empty_index((self.count + more) // 2)
        self._enter(self.numbers[: self.count].astype(np.int64), 0)

    def _empty_index(self, needed: int) -> tuple[RowIndex, np.ndarray]:
        index = RowIndex(self._num_rows, needed)
        return index, np.full(index.size + 1, -1, np.int32)


def reserved(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Zeros, whose memory the system provides, and counts, when it is first written to."""
    size = max(1, int(np.prod(shape, dtype=np.int64))) * np.dtype(dtype).itemsize
    if not _NO_RESERVE:
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    # As NumPy does for its own arrays: rows at random places are found with fewer misses.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    # An array of NumPy's own dtype: those of ml_dtypes have no buffers.
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)
