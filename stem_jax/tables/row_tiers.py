"""Rows of one block in host memory, as many as there is room for, and the others on disk.

A row that is asked for comes from memory, else from disk, else it is made: nobody has written it
yet. Rows that came from disk stay in memory, where they take the place of others: a hand goes round
and takes those that nobody asked for since it came by (second chance). What was written lies in
memory until it has to go, or is saved; only then it is written to disk.

What a call costs depends on its rows, and on the rows that calls before it have asked for, not on
how many there is room for.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping

import numpy as np

from stem_jax.tables.row_file import RowFile
from stem_jax.tables.row_places import LOAD, RowPlaces
from stem_jax.tables.row_record import Arrays, RowRecord
from stem_jax.tables.whole_rows import put_rows

# Flags of a place in memory: asked for since the hand came by; written since it was on disk.
_ASKED, _DIRTY = np.uint8(1), np.uint8(2)
_CLEAN = np.uint8(0)
# Places that the hand looks at in one go.
_LEAST_LOOK = 1024
_FLUSHED = 2**15

# Values by field, [n, ...], of rows [n] that nobody has written.
Make = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclasses.dataclass
class TierCounts:
    """Rows that were asked for, by where they came from; evicted to disk; written back by saves."""

    from_memory: int = 0
    from_disk: int = 0
    made: int = 0
    evicted: int = 0
    saved: int = 0


class RowTiers:
    """Memory in front of a `RowFile`. Gathers and one write or save may run at once, in threads.

    A gather that runs beside a write of the same row gives it as it was before, or after.

    Attributes:
        file: the rows on disk.
        counts: what was done.
        host_rows: rows that there is room for in memory.
    """

    def __init__(self, file: RowFile, host_rows: int):
        """
        Args:
            file: belongs to this object from now on; who else reads it sees what is on disk alone.
            host_rows: at least 1.
        """
        self.file = file
        self.counts = TierCounts()
        self.host_rows = host_rows
        self._record = file.record
        # Memory that the system provides when it is first written to.
        self._arrays = {
            field.name: np.zeros((host_rows, *field.shape), np.dtype(field.dtype))
            for field in file.record.fields
        }
        self._row_at = np.zeros(host_rows, np.int32)
        self._flags = np.zeros(host_rows, np.uint8)
        self._places = RowPlaces(host_rows)
        # Places [0, filled) have rows.
        self._filled = 0
        self._hand = 0
        # Taken in this order. Writes and saves, one at a time.
        self._write = threading.Lock()
        # Whatever changes which rows are in memory, or writes to disk; waits for the disk.
        self._moving = threading.Lock()
        # Memory and its books; never waits for anything.
        self._memory = threading.Lock()
        # Of each gather that reads from disk, rows that were written to disk meanwhile.
        self._outdated: dict[int, list[np.ndarray]] = {}
        self._next_gather = 0

    @staticmethod
    def needed_bytes(record: RowRecord, host_rows: int) -> int:
        """Bytes of memory, but for the buffers of a call and the disk's bitmaps."""
        books = 4 + 1 + 2 * 4 / LOAD
        return int(host_rows * (record.row_bytes + books))

    def known(self, rows: np.ndarray) -> np.ndarray:
        """[n] bool, which of rows [n] have been written."""
        with self._memory:
            known = self._places.find(rows) >= 0
        # What leaves memory is on disk before.
        known[~known] = self.file.known(rows[~known])
        return known

    def gather(self, rows: np.ndarray, out: Arrays, make: Make) -> None:
        """Copies rows into the first n of each field of `out`.

        Args:
            rows: [n] integers, numbers within the block.
            out: by field, [>= n, ...] of the field's dtype.
            make: gives the rows that nobody has written; they are not kept.

        Raises:
            InputError: a record on disk is not whole, or the disk has no room for rows that have to
                leave memory.
        """
        with self._memory:
            places = self._places.find(rows)
            missing = np.flatnonzero(places < 0)
            self._copy(places, out)
            self.counts.from_memory += len(rows) - len(missing)
            if not len(missing):
                return
            gather, self._next_gather = self._next_gather, self._next_gather + 1
            self._outdated[gather] = []
        try:
            known = self.file.known(rows[missing])
            self._make(rows, missing[~known], out, make)
            self._read(rows, missing[known], out, gather)
        finally:
            with self._memory:
                del self._outdated[gather]

    def write(self, rows: np.ndarray, values: Arrays) -> None:
        """Stores rows.

        Args:
            rows: [n] distinct integers, numbers within the block.
            values: by field, [>= n, ...]; the first n are stored.

        Raises:
            InputError: the disk has no room for rows that have to leave memory; some of the rows
                may have been stored, each whole.
        """
        with self._write:
            for first in range(0, len(rows), self._most):
                part = slice(first, min(first + self._most, len(rows)))
                with self._moving:
                    self._put(rows[part], {name: values[name][part] for name in self._arrays})

    def save(self, name: str, captured: Callable[[], None] = lambda: None) -> None:
        """Keeps all rows as they are now, see `RowFile.save`; gathers go on, writes wait.

        Args:
            name: of the save.
            captured: is called once writes go on; what they write is not of the save.

        Raises:
            InputError, ValueError: as `RowFile.save`.
        """
        waiting = True

        def go_on() -> None:
            nonlocal waiting
            waiting = False
            self._write.release()
            captured()

        self._write.acquire()
        try:
            self._flush()
            self.file.save(name, go_on)
        finally:
            if waiting:
                self._write.release()

    @property
    def _most(self) -> int:
        """Rows that come into memory at a time: some others stay."""
        return max(1, self.host_rows // 2)

    def _copy(self, places: np.ndarray, out: Arrays) -> None:
        """Copies what lies at places [n], where they are none of -1."""
        at = np.flatnonzero(places >= 0)
        found = places[at]
        self._flags[found] |= _ASKED
        for name, array in self._arrays.items():
            if len(at) == len(places):
                # mode="clip" copies straight into `out`, with the GIL released.
                np.take(array, found, axis=0, out=out[name][: len(at)], mode="clip")
            else:
                out[name][at] = array[found]

    def _make(self, rows: np.ndarray, at: np.ndarray, out: Arrays, make: Make) -> None:
        if len(at):
            made = make(rows[at])
            for name in self._arrays:
                out[name][at] = made[name]
            with self._memory:
                self.counts.made += len(at)

    def _read(self, rows: np.ndarray, at: np.ndarray, out: Arrays, gather: int) -> None:
        if not len(at):
            return
        values = self._record.empty(len(at))
        self.file.read(rows[at], values)
        for name, array in values.items():
            out[name][at] = array
        with self._moving:
            self._take_in(rows[at], values, gather)
        with self._memory:
            self.counts.from_disk += len(at)

    def _take_in(self, rows: np.ndarray, values: Arrays, gather: int) -> None:
        """Rows from disk into memory, but for those that are there or changed since."""
        rows, at = np.unique(rows, return_index=True)
        with self._memory:
            fresh = self._places.find(rows) < 0
            for outdated in self._outdated[gather]:
                fresh &= ~np.isin(rows, outdated)
        rows, at = rows[fresh][: self._most], at[fresh][: self._most]
        places = self._make_room(len(rows))
        with self._memory:
            entering = {name: np.take(array, at, axis=0) for name, array in values.items()}
            self._enter(rows, places, entering, _CLEAN)

    def _put(self, rows: np.ndarray, values: Arrays) -> None:
        with self._memory:
            places = self._places.find(rows)
            there = np.flatnonzero(places >= 0)
            for name, array in self._arrays.items():
                put_rows(array, places[there], np.take(values[name], there, axis=0))
            self._flags[places[there]] |= _ASKED | _DIRTY
        new = np.flatnonzero(places < 0)
        room = self._make_room(len(new))
        with self._memory:
            entering = {name: np.take(array, new, axis=0) for name, array in values.items()}
            self._enter(rows[new], room, entering, _DIRTY)

    def _enter(self, rows: np.ndarray, places: np.ndarray, values: Arrays, flags: np.uint8) -> None:
        for name, array in self._arrays.items():
            put_rows(array, places, values[name])
        self._row_at[places] = rows
        self._flags[places] = flags
        self._places.put(rows, places)

    def _make_room(self, count: int) -> np.ndarray:
        """Free places, int64 [count]; rows that were there are on disk before they go."""
        end = min(self._filled + count, self.host_rows)
        new = np.arange(self._filled, end)
        left = self._evicted(count - len(new))
        self._filled = end
        return np.concatenate([new, left])

    def _evicted(self, count: int) -> np.ndarray:
        if not count:
            return np.zeros(0, np.int64)
        with self._memory:
            places = self._chosen(count)
        # Nobody else writes meanwhile.
        dirty = places[self._flags[places] & _DIRTY != 0]
        self._write_back(dirty)
        with self._memory:
            self._places.remove(self._row_at[places])
            self._flags[places] = 0
        self.counts.evicted += len(dirty)
        return places

    def _chosen(self, count: int) -> np.ndarray:
        """Places of rows that nobody asked for since the hand came by."""
        taken = np.zeros(0, np.int64)
        while count:
            end = min(self._hand + max(2 * count, _LEAST_LOOK), self.host_rows, self._filled)
            looked = np.arange(self._hand, end)
            idle = looked[self._flags[self._hand : end] & _ASKED == 0]
            # The second time round, those that it has taken already.
            idle = idle[~np.isin(idle, taken)][:count]
            count -= len(idle)
            end = int(idle[-1]) + 1 if not count else end
            self._flags[self._hand : end] &= ~_ASKED
            self._hand = end % self._filled
            taken = np.concatenate([taken, idle])
        return taken

    def _write_back(self, places: np.ndarray) -> None:
        """Writes rows to disk, which stay in memory until somebody takes them out of it."""
        values = {name: array[places] for name, array in self._arrays.items()}
        rows = self._row_at[places].astype(np.int64)
        self.file.write(rows, values)
        with self._memory:
            self._flags[places] &= ~_DIRTY
            for outdated in self._outdated.values():
                outdated.append(rows)

    def _flush(self) -> None:
        """Writes all rows to disk that are not there as they are."""
        for first in range(0, self._filled, _FLUSHED):
            with self._moving:
                part = self._flags[first : first + _FLUSHED]
                dirty = np.flatnonzero(part & _DIRTY) + first
                self._write_back(dirty)
                self.counts.saved += len(dirty)
