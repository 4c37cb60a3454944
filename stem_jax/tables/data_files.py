"""Records at numbered places of files of some GiB, read and written many at a time.

Reads go through maps of the files, in many threads, so that the disk has many requests at once. A
thread copies its records in one call, without Python's lock: of 16,384 records, a call for each
costs 20 ms where they are in memory, and a second while another thread computes in Python.
Writes go through the file, neighbouring places in one call.
"""

import functools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from stem_jax.files import sync_folder

_FILE_BYTES = 2**30
# Of a table of any size there are so many files or, with saves, a few times as many.
_MOST_FILES = 128
# A file grows by a part of all files, within these bounds.
_GROWTH = 8
_LEAST_STEP, _MOST_STEP = 2**16, 2**26
# The system reads and writes whole pages: over so small a gap one call costs less than two.
_GAP_BYTES = 4096
_SPAN_BYTES = 2**22
# Requests that the disk has at once; a thread for fewer records is not worth it.
_READERS = 32
_LEAST_READ = 64


def places_of_a_file(record_bytes: int, num_rows: int) -> int:
    """Places that each data file of a block of so many rows has."""
    return max(1, _FILE_BYTES // record_bytes, -(-num_rows // _MOST_FILES))


class DataFiles:
    """The data files of a folder. Any number of threads may read while one does the rest."""

    def __init__(self, folder: Path, record_bytes: int, file_places: int, *, writable: bool):
        """
        Args:
            folder: of the files, which may have none.
            record_bytes: of a record.
            file_places: places of a file that has its full size.
            writable: whether `write`, `grow` and `cut` will be called.
        """
        self._folder = folder
        self._record_bytes = record_bytes
        self._file_places = file_places
        self._writable = writable
        self._files: list[int] = []
        # Of each file, [places, record bytes], as far as it has room.
        self._maps: list[np.ndarray] = []
        self._unsynced: set[int] = set()
        while self.path(len(self._files)).exists():
            self._open()

    @property
    def capacity(self) -> int:
        """Places that there is room for."""
        if not self._maps:
            return 0
        return (len(self._maps) - 1) * self._file_places + len(self._maps[-1])

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return self.capacity * self._record_bytes

    def path(self, number: int) -> Path:
        """Of a file."""
        return self._folder / f"{number:05d}.rows"

    def path_of(self, place: int) -> Path:
        """Of the file that has a place."""
        return self.path(place // self._file_places)

    def step(self, least: int, most: int) -> int:
        """Places by which to grow for `least` more, and for some of the next times.

        most: places that all files may have.
        """
        wanted = int(np.clip(self.num_bytes // _GROWTH, _LEAST_STEP, _MOST_STEP))
        return max(least, min(wanted // self._record_bytes, most - self.capacity))

    def grow(self, places: int) -> None:
        """Makes room for more places, if only for some of them.

        Raises:
            OSError: the disk is full.
        """
        while places > 0:
            if not self._maps or len(self._maps[-1]) == self._file_places:
                path = self.path(len(self._files))
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
                self._open()
            have = len(self._maps[-1])
            size = min(have + places, self._file_places)
            # What has room beforehand is not found full in the middle of a record.
            os.posix_fallocate(
                self._files[-1],
                have * self._record_bytes,
                (size - have) * self._record_bytes,
            )
            self._maps[-1] = self._mapped(self._files[-1])
            places -= size - have

    def cut(self, places: int) -> None:
        """Removes the files that have none of the first `places`; what readers have stays."""
        keep = -(-places // self._file_places)
        for number in reversed(range(keep, len(self._files))):
            self.path(number).unlink()
            os.close(self._files.pop())
            self._maps.pop()
            self._unsynced.discard(number)

    def read(self, places: np.ndarray) -> np.ndarray:
        """Records [n, record bytes] uint8 of ascending places [n]; one may be asked for twice."""
        records = np.empty((len(places), self._record_bytes), np.uint8)
        work = [
            (
                self._maps[number],
                places[first:last] - number * self._file_places,
                records[first:last],
            )
            for number, part in self._by_file(places)
            for first, last in _shares(part.start, part.stop, len(places))
        ]
        if len(work) == 1:
            _copy(work[0])
        else:
            # Whoever waits for the results sees their errors.
            for _ in _readers().map(_copy, work):
                pass
        return records

    def write(self, places: np.ndarray, records: np.ndarray) -> None:
        """Writes records [n, record bytes] to ascending places [n], which have room.

        Raises:
            OSError: of the file system; some records may be written.
        """
        for number, part in self._by_file(places):
            at = places[part] - number * self._file_places
            for first, last in _spans(at, self._record_bytes):
                self._write_span(number, at[first:last], records[part][first:last])
            self._unsynced.add(number)

    def unsynced(self) -> set[int]:
        """Numbers of the files that were written to and may not be on the disk yet."""
        return set(self._unsynced)

    def sync(self, numbers: set[int]) -> None:
        """What was written to these files is on the disk; `write` may go on meanwhile.

        Raises:
            OSError: it could not be written.
        """
        # What is written from now on names its file again.
        self._unsynced -= numbers
        try:
            for number in sorted(numbers):
                os.fsync(self._files[number])
            sync_folder(self._folder)
        except OSError:
            self._unsynced |= numbers
            raise

    def close(self) -> None:
        """Closes the files; what is mapped stays until nobody has it."""
        for file in self._files:
            os.close(file)
        self._files, self._maps = [], []

    def _by_file(self, places: np.ndarray) -> list[tuple[int, slice]]:
        """Numbers of files, and which of ascending places each has."""
        if not len(places):
            return []
        numbers = range(places[0] // self._file_places, places[-1] // self._file_places + 1)
        starts = np.array([number * self._file_places for number in [*numbers, numbers[-1] + 1]])
        bounds = np.searchsorted(places, starts).tolist()
        return [
            (number, slice(first, last))
            for number, first, last in zip(numbers, bounds[:-1], bounds[1:], strict=True)
            if first < last
        ]

    def _open(self) -> None:
        flags = os.O_RDWR if self._writable else os.O_RDONLY
        file = os.open(self.path(len(self._files)), flags)
        self._files.append(file)
        self._maps.append(self._mapped(file))

    def _mapped(self, file: int) -> np.ndarray:
        places = os.fstat(file).st_size // self._record_bytes
        if not places:
            return np.zeros((0, self._record_bytes), np.uint8)
        size = places * self._record_bytes
        mapped = mmap.mmap(file, size, mmap.MAP_SHARED, mmap.PROT_READ)
        # Neighbouring places are of rows that nobody asks for together.
        mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, np.uint8).reshape(places, self._record_bytes)

    def _write_span(self, number: int, at: np.ndarray, records: np.ndarray) -> None:
        file, size = self._files[number], self._record_bytes
        start, count = int(at[0]) * size, int(at[-1] - at[0]) + 1
        if count > len(at):
            # What lies in the gaps is written as it is there, as the page that has it would be.
            span = np.empty((count, size), np.uint8)
            _read_all(file, span, start)
            span[at - at[0]] = records
            records = span
        _write_all(file, records, start)


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="row-reader")


def _copy(work: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    source, at, out = work
    # mode="clip" copies straight into `out`, without Python's lock.
    np.take(source, at, axis=0, out=out, mode="clip")


def _shares(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Parts of [first, last), of `count` records, such that all readers have some."""
    size = max(_LEAST_READ, -(-count // _READERS))
    return [(start, min(start + size, last)) for start in range(first, last, size)]


def _spans(places: np.ndarray, record_bytes: int) -> list[tuple[int, int]]:
    """Which ascending places to write in one call."""
    far = np.flatnonzero(np.diff(places) - 1 > _GAP_BYTES // record_bytes) + 1
    spans, most = [], max(1, _SPAN_BYTES // record_bytes)
    for first, last in zip([0, *far.tolist()], [*far.tolist(), len(places)], strict=True):
        while first < last:
            end = first + int(
                np.searchsorted(places[first:last], int(places[first]) + most, side="left")
            )
            spans.append((first, end))
            first = end
    return spans


def _read_all(file: int, span: np.ndarray, start: int) -> None:
    view, done = span.reshape(-1).data, 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            raise OSError(f"a data file ends at {start + done}, within its places")
        done += count


def _write_all(file: int, records: np.ndarray, start: int) -> None:
    view, done = np.ascontiguousarray(records).reshape(-1).data, 0
    while done < len(view):
        done += os.pwrite(file, view[done:], start + done)
