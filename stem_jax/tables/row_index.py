"""Where books have the entry of a row, when they have entries of some rows of many.

Books are arrays; an index tells the place of a row in them. Rows of a table that is not much larger
than the books lie at their own numbers. Of a larger one they are found by hashing: a row lies at
the first free place of a walk that begins at its hash, with steps of 1, 2, 3, ..., which visits
every place, their number being a power of two. Nothing is ever taken out alone: a place that was
passed on a walk stays taken, so a walk that comes to a free place has missed nothing.
"""

import numpy as np

# Places for each row that the books must hold: walks are short in tables half empty.
_ROOM = 8
# A table of so many places for each row costs no more than hashing does.
_DIRECT = 2 * _ROOM
_FEWEST_ROWS = 4096
_NONE = -1
# 2^64 / golden ratio, odd: neighbouring rows fall far apart.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class RowIndex:
    """Places of rows of [0, num_rows); no time and no memory depends on `num_rows`.

    Attributes:
        size: number of places.
        absent: the place that `find` gives for a row without one, equal to `size`: of an array of
            `size + 1`, the last entry is what holds for rows that the books do not know.
        most: rows that may have a place at a time.
    """

    def __init__(self, num_rows: int, needed: int):
        """needed: rows that the books must hold at least; there is room for four times as many."""
        needed = max(needed, _FEWEST_ROWS)
        self.hashed = num_rows > _DIRECT * needed
        self.size = 1 << (_ROOM * needed - 1).bit_length() if self.hashed else num_rows
        self.most = self.size // 2 if self.hashed else num_rows
        self.absent = self.size
        # One place more than there are, as in the books.
        self._rows = np.full(self.size + 1, _NONE, np.int32) if self.hashed else None
        self._shift = np.uint64(64 - (self.size - 1).bit_length())
        self._count = 0

    def has_room(self, count: int) -> bool:
        """Whether so many more rows can be added."""
        return not self.hashed or self._count + count <= self.most

    def find(self, rows: np.ndarray) -> np.ndarray:
        """[n] int64, the places of rows [n] int64; `absent` where one has none."""
        return self.look(rows)[0]

    def look(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `find` gives, and [n] int64 where the walk of each row ended.

        That is a free place where the row has none; `add` begins there.
        """
        if self._rows is None:
            return rows, rows
        at = self._begin(rows)
        held = self._rows[at]
        places, ends = np.where(held == rows, at, self.absent), at.copy()
        # The first step is that of all rows, those after it are of few.
        walking = np.flatnonzero((held != rows) & (held != _NONE))
        rows, at = rows[walking], at[walking]
        step = 0
        while len(walking):
            step += 1
            at = (at + step) & (self.size - 1)
            ends[walking] = at
            held = self._rows[at]
            found = held == rows
            places[walking[found]] = at[found]
            on = np.flatnonzero(~found & (held != _NONE))
            walking, rows, at = walking[on], rows[on], at[on]
        return places, ends

    def add(self, rows: np.ndarray, ends: np.ndarray | None = None) -> np.ndarray:
        """[n] int64, new places of distinct rows [n] int64 that have none.

        Args:
            rows: that get places.
            ends: [n] of `look`, if nothing was added since.

        Raises:
            RuntimeError: there is no room, see `has_room`; nothing was added.
        """
        if self._rows is None:
            return rows
        if not self.has_room(len(rows)):
            raise RuntimeError(f"{len(rows)} rows more than the {self.most} of an index")
        self._count += len(rows)
        if ends is None:
            return self._added(rows)
        # Of rows that come to one place at a time, one stays.
        self._rows[ends] = rows
        others = np.flatnonzero(self._rows[ends] != rows)
        places = ends.copy()
        places[others] = self._added(rows[others])
        return places

    def _added(self, rows: np.ndarray) -> np.ndarray:
        assert self._rows is not None
        places = at = self._begin(rows)
        walking = np.arange(len(rows))
        step = 0
        while len(walking):
            free = np.flatnonzero(self._rows[at] == _NONE)
            # Again one stays; the others see the place taken.
            self._rows[at[free]] = rows[free]
            on = np.flatnonzero(self._rows[at] != rows)
            step += 1
            walking, rows, at = walking[on], rows[on], (at[on] + step) & (self.size - 1)
            places[walking] = at
        return places

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that have places, int64, and these, of a hashed index."""
        assert self._rows is not None
        places = np.flatnonzero(self._rows != _NONE)
        return self._rows[places].astype(np.int64), places

    def clear(self) -> None:
        """Takes all places away, of a hashed index."""
        assert self._rows is not None
        self._rows[:] = _NONE
        self._count = 0

    def _begin(self, rows: np.ndarray) -> np.ndarray:
        return ((rows.astype(np.uint64) * _FACTOR) >> self._shift).astype(np.int64)
