"""Rows of one block on disk, where a save costs what changed and a crash costs what was not saved.

A row is a record at a numbered place, and a place is never written to while anybody needs it: a row
that changes goes to a free place, and its old place is free when neither the live rows nor a kept
save has it any more. With three places taken, one save and row b written anew:

    place          0    1    2    3
    record         a    b    c    b'
    needed by      LS   S    LS   L          L: live, S: the save

So whatever moment a process ends at, the records of every kept save are whole. Free places are
given out in ascending order, so that writing is mostly sequential.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.tables import row_folder, saved_rows
from stem_jax.tables.data_files import DataFiles
from stem_jax.tables.disk_index import DiskIndex, mapped_zeros
from stem_jax.tables.disk_room import DiskRoom
from stem_jax.tables.row_record import Arrays, RowRecord

# Rows are written so many at a time: buffers do not grow with what is asked for.
_PIECE = 2**15
_SORT_PIECE = 2**18


@dataclasses.dataclass
class DiskCounts:
    """What was read and written since the file was opened; seconds are those of all threads."""

    rows_read: int = 0
    bytes_read: int = 0
    seconds_read: float = 0.0
    rows_written: int = 0
    bytes_written: int = 0
    seconds_written: float = 0.0


class RowFile:
    """Rows of a block on disk. `known`, `read` and one `write` may run at once, in any threads.

    Attributes:
        counts: what was done.
        record: how a row lies on disk.
    """

    def __init__(
        self,
        folder: Path,
        record: RowRecord,
        num_rows: int,
        facts: Mapping[str, Any],
        lock: row_folder.Lock,
        most_saves: int,
        most_bytes: int | None,
    ):
        """Use `create` or `open`."""
        self.record = record
        self.counts = DiskCounts()
        self._folder = folder
        self._lock = lock
        self._files = DataFiles(
            folder / row_folder.DATA, record.size, facts["file_places"], writable=True
        )
        self._index = DiskIndex(folder, num_rows)
        self._room = DiskRoom(
            folder, self._files, record.size, self._other_bytes, most_saves, most_bytes
        )
        self._maps = self._room.maps
        # For the index and the readers; held for a look at a time.
        self._looking = threading.Lock()
        # For the maps and the files; held by who writes.
        self._writing = threading.Lock()
        # For the saves.
        self._saving = threading.Lock()
        # Moves of rows so far; of each reader, those before it looked.
        self._moves = 0
        self._readers: dict[int, int] = {}
        self._next_reader = 0
        # Places that rows left, after which move.
        self._left: list[tuple[int, np.ndarray]] = []

    @classmethod
    def create(
        cls,
        folder: Path,
        record: RowRecord,
        num_rows: int,
        facts: Mapping[str, Any],
        *,
        most_saves: int = 1,
        most_bytes: int | None = None,
        replace: bool = False,
    ) -> "RowFile":
        """A file without rows.

        Args:
            folder: of this block alone; made if there is none.
            record: how a row lies on disk.
            num_rows: of the block, at most 2^31 - 1.
            facts: what else the rows depend on, for JSON; `open` asks for the same.
            most_saves: that will be kept; more places than they and the live rows could need are
                never taken before they are needed.
            most_bytes: that the folder may come to; None for as much as the disk has.
            replace: drop saves that are in the folder, of a run that has no checkpoint of them.

        Raises:
            InputError: another run has the folder, it has saves, or it cannot be written.
        """
        held = row_folder.lock(folder)
        with row_folder.released_on_error(held, folder):
            wanted = row_folder.layout_facts(record, num_rows, facts)
            row_folder.begin(folder, wanted, replace=replace)
            return cls(folder, record, num_rows, wanted, held, most_saves, most_bytes)

    @classmethod
    def open(
        cls,
        folder: Path,
        record: RowRecord,
        num_rows: int,
        facts: Mapping[str, Any],
        save: str,
        *,
        keep: Iterable[str] | None = None,
        most_saves: int = 1,
        most_bytes: int | None = None,
    ) -> "RowFile":
        """Goes back to a save: what was written after it is gone.

        Args:
            folder, record, num_rows, facts, most_saves, most_bytes: as of `create`.
            save: its name.
            keep: other saves that stay; None for all of the folder.

        Raises:
            InputError: another run has the folder, the rows are of another layout, there is no such
                save, or a file of a save is torn.
        """
        held = row_folder.lock(folder)
        with row_folder.released_on_error(held, folder):
            wanted = row_folder.layout_facts(record, num_rows, facts)
            row_folder.check_facts(folder, wanted)
            index = saved_rows.SavedIndex(folder, save)
            index.verify()
            kept = {save, *(saved_rows.saves_in(folder) if keep is None else keep)}
            row_folder.drop_unfinished(folder, kept)
            opened = cls(folder, record, num_rows, wanted, held, most_saves, most_bytes)
            opened._go_back(save, sorted(kept), index)
            return opened

    @property
    def num_rows(self) -> int:
        """Rows that are on disk."""
        return self._index.count

    @property
    def saves(self) -> tuple[str, ...]:
        """Names of those that are kept."""
        return tuple(self._maps.saves)

    @property
    def num_bytes(self) -> int:
        """Of disk that the folder takes."""
        return self._room.num_bytes

    def known(self, rows: np.ndarray) -> np.ndarray:
        """[n] bool, which of rows [n] are on disk."""
        with self._looking:
            return self._index.find(rows) >= 0

    def read(self, rows: np.ndarray, out: Arrays) -> None:
        """Copies rows into the first n of each field of `out`.

        Args:
            rows: [n] integers, numbers within the block, which are `known`.
            out: by field, [>= n, ...] of the field's dtype.

        Raises:
            KeyError: a row is not on disk.
            InputError: a record is not whole: file, place and what to do.
        """
        start = time.perf_counter()
        with self._looking:
            reader, self._next_reader = self._next_reader, self._next_reader + 1
            self._readers[reader] = self._moves
            places = self._index.find(rows)
        try:
            saved_rows.read_records(self._files, self.record, rows, places, out)
        finally:
            with self._looking:
                del self._readers[reader]
                self.counts.rows_read += len(rows)
                self.counts.bytes_read += len(rows) * self.record.size
                self.counts.seconds_read += time.perf_counter() - start

    def write(self, rows: np.ndarray, values: Arrays) -> None:
        """Stores rows.

        Args:
            rows: [n] distinct integers, numbers within the block.
            values: by field, [>= n, ...]; the first n are stored.

        Raises:
            InputError: the disk is full, or `most_bytes` are taken; some of the rows may have been
                stored, each whole.
        """
        start = time.perf_counter()
        for first in range(0, len(rows), _PIECE):
            part = slice(first, min(first + _PIECE, len(rows)))
            records = self.record.pack(
                rows[part], {name: values[name][part] for name in self.record.names}
            )
            with self._writing:
                self._write(rows[part], records)
        self.counts.rows_written += len(rows)
        self.counts.bytes_written += len(rows) * self.record.size
        self.counts.seconds_written += time.perf_counter() - start

    def save(self, name: str, captured: Callable[[], None] = lambda: None) -> None:
        """Keeps all rows as they are now, under a name: they are on the disk when it returns.

        `write` waits while the index is copied, and goes on while the disk writes.

        Args:
            name: letters, digits, _ . and -.
            captured: is called once writes go on; what they write is not of the save.

        Raises:
            InputError: the disk is full; earlier saves stay usable.
            ValueError: the name is taken, or is none.
        """
        saved_rows.check_name(name)
        with self._saving:
            if name in self._maps.saves:
                raise ValueError(f"there is a save {name}; drop it first, see `kept`")
            parts = saved_rows.parts_of(self._folder, name)
            try:
                with self._room.refused(self._index.count * saved_rows.ROW_BYTES):
                    parts.mkdir()
                    self._save(name, captured)
            except BaseException:
                saved_rows.remove(self._folder, name)
                with self._writing:
                    if name in self._maps.saves:
                        self._maps.drop(name, self._places_left())
                raise

    def kept(self, names: Iterable[str]) -> None:
        """Drops all saves but these; their places become free, and files that nobody needs go."""
        with self._saving:
            for name in set(self._maps.saves) - set(names):
                saved_rows.remove(self._folder, name)
                with self._writing:
                    self._maps.drop(name, self._places_left())
            with self._writing:
                self._release()
                self._room.cut()

    def close(self) -> None:
        """Gives the folder back. What was written since the last save is lost."""
        with self._saving, self._writing, self._looking:
            self._files.close()
            self._index.close()
            self._lock.release()

    def _go_back(self, save: str, names: list[str], index: saved_rows.SavedIndex) -> None:
        for name in names:
            bits = saved_rows.read_needed(self._folder, name, self._maps.capacity)
            self._maps.put_save(name, bits)
        self._maps.go_to(save)
        # What was written after the saves may have filled the disk.
        self._room.cut()
        self._index.reserve(index.count)
        for rows, places in index.pieces():
            self._index.put(rows, places)

    def _write(self, rows: np.ndarray, records: np.ndarray) -> None:
        with self._room.refused(len(rows) * self.record.size):
            self._release()
            with self._looking:
                self._index.reserve(len(rows))
            places = self._room.take(len(rows), self._index.count)
            try:
                order = np.argsort(places)
                self._files.write(places[order], records[order])
            except BaseException:
                self._maps.free(places)
                raise
        with self._looking:
            old = self._index.find(rows)
            self._index.put(rows, places)
            self._moves += 1
        self._maps.use(places)
        old = old[old >= 0]
        self._maps.leave(old)
        self._left.append((self._moves, old))
        self._release()

    def _release(self) -> None:
        """Frees the places that rows left before all readers of now had looked."""
        with self._looking:
            oldest = min(self._readers.values(), default=self._moves)
        while self._left and self._left[0][0] <= oldest:
            self._maps.free(self._left.pop(0)[1])

    def _places_left(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(places for _, places in self._left)])

    def _save(self, name: str, captured: Callable[[], None]) -> None:
        with self._writing:
            self._maps.keep(name)
            written = self._files.unsynced()
            count = self._index.count
            saved_rows.write_needed(self._folder, name, self._maps.saves[name])
            unsorted = None if self._index.is_sorted else self._unsorted(count)
            if unsorted is None:
                saved_rows.write_index(self._folder, name, self._index.pieces(), count)
        captured()
        if unsorted is not None:
            # In place, and in pages of a file.
            unsorted.sort()
            saved_rows.write_index(self._folder, name, _split(unsorted), count)
        self._files.sync(written)
        saved_rows.seal(self._folder, name, count)

    def _unsorted(self, count: int) -> np.ndarray:
        """[count] int64, row * 2^32 + place, in a scratch file."""
        path = self._folder / "index-sort"
        both = mapped_zeros(path, max(1, count), np.int64)[:count]
        path.unlink()
        first = 0
        for rows, places in self._index.pieces():
            last = first + len(rows)
            both[first:last] = rows.astype(np.int64) << 32 | places
            first = last
        return both

    def _other_bytes(self) -> int:
        parts = (self._folder / saved_rows.SAVES).glob("*/*")
        return self._index.num_bytes + sum(path.stat().st_size for path in parts)


def _split(both: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, len(both), _SORT_PIECE):
        piece = both[first : first + _SORT_PIECE]
        yield (piece >> 32).astype(np.int32), (piece & 0xFFFFFFFF).astype(np.int32)
