"""Numbers of rows, found by hashing: rows may come and go, and a row costs some 13 bytes.

A row lies at the first free cell from its hash on, so that a walk that comes to a free cell has
missed nothing. Taking rows out keeps that: all that lie between a cell that becomes free and the
next free one are put in again.
"""

from collections.abc import Callable, Iterator

import numpy as np

# Part of the cells that may be taken: a walk to a row that is not there takes four steps then.
LOAD = 0.6
_LEAST = 64
_PIECE = 2**18
# 2^64 / golden ratio, odd: neighbouring rows fall far apart.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)

# Zeros, int32, [cells].
Allocate = Callable[[str, int], np.ndarray]


def in_memory(_: str, size: int) -> np.ndarray:
    """Cells that the system provides when they are first written to."""
    return np.zeros(size, np.int32)


class RowPlaces:
    """A number for each of some rows of [0, 2^31). Not for several threads at once.

    Attributes:
        most: rows that there is room for.
        size: cells.
        count: rows that have a number.
    """

    def __init__(self, most: int, allocate: Allocate = in_memory):
        """allocate: gives the memory of the cells, by name and number of cells."""
        self.most = most
        self.size = max(_LEAST, int(most / LOAD) + 1)
        self.count = 0
        # Inverted, so that no row is 0: fresh memory is free cells.
        self._rows = allocate("rows", self.size)
        self._numbers = allocate("numbers", self.size)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """[n] int64, the numbers of rows [n]; -1 where a row has none."""
        cells = self._cells(rows)
        return np.where(cells < 0, -1, self._numbers[cells].astype(np.int64))

    def put(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """Gives distinct rows [n] their numbers [n], instead of those that they had.

        Raises:
            RuntimeError: there may be no room; nothing was put.
        """
        if self.count + len(rows) > self.most:
            added = np.count_nonzero(self._cells(rows) < 0)
            if self.count + added > self.most:
                raise RuntimeError(f"{added} rows more than the {self.most} that there is room for")
        wanted = ~np.asarray(rows, np.int32)
        numbers = np.asarray(numbers, np.int32)
        walking, at = np.arange(len(rows)), self._begin(rows)
        while len(walking):
            free = self._rows[at] == 0
            # Of rows that come to one cell at a time, one stays; the others see it taken.
            self._rows[at[free]] = wanted[walking[free]]
            stays = self._rows[at] == wanted[walking]
            self.count += int(np.count_nonzero(stays & free))
            self._numbers[at[stays]] = numbers[walking[stays]]
            walking, at = walking[~stays], self._next(at[~stays])

    def remove(self, rows: np.ndarray) -> None:
        """Takes distinct rows [n] out.

        Raises:
            KeyError: one has no number; nothing was taken out.
        """
        at = self._cells(rows)
        if (at < 0).any():
            raise KeyError(f"row {rows[at < 0][0]} has no number")
        self._rows[at] = 0
        self.count -= len(at)
        cells = []
        while len(at):
            at = self._next(at)
            # Another cell that became free begins a walk of its own.
            at = at[self._rows[at] != 0]
            cells.append(at)
        moved = np.concatenate(cells) if cells else at
        again, numbers = ~self._rows[moved], self._numbers[moved]
        self._rows[moved] = 0
        self.count -= len(moved)
        self.put(again, numbers)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows and their numbers, int32, some at a time, in no order."""
        for first in range(0, self.size, _PIECE):
            held = self._rows[first : first + _PIECE]
            at = np.flatnonzero(held)
            yield ~held[at], self._numbers[first : first + _PIECE][at]

    def _cells(self, rows: np.ndarray) -> np.ndarray:
        wanted = ~np.asarray(rows, np.int32)
        cells = np.full(len(rows), -1, np.int64)
        walking, at = np.arange(len(rows)), self._begin(rows)
        while len(walking):
            held = self._rows[at]
            found = held == wanted[walking]
            cells[walking[found]] = at[found]
            on = ~found & (held != 0)
            walking, at = walking[on], self._next(at[on])
        return cells

    def _begin(self, rows: np.ndarray) -> np.ndarray:
        high = (np.asarray(rows).astype(np.uint64) * _FACTOR) >> _HALF
        return ((high * np.uint64(self.size)) >> _HALF).astype(np.int64)

    def _next(self, at: np.ndarray) -> np.ndarray:
        at = at + 1
        at[at == self.size] = 0
        return at
