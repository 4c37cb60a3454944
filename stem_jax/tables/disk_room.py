"""Free places for rows that change: data files grow where they must, and where it pays."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from stem_jax.errors import InputError
from stem_jax.tables.data_files import DataFiles
from stem_jax.tables.disk_space import FULL, full_disk
from stem_jax.tables.place_maps import PlaceMaps

_MOST_PLACES = 2**31 - 1


class DiskRoom:
    """The places of data files. Not for several threads at once, but for the reads of the files.

    Attributes:
        files: that have the places.
        maps: who needs them.
    """

    def __init__(
        self,
        folder: Path,
        files: DataFiles,
        record_bytes: int,
        other_bytes: Callable[[], int],
        most_saves: int,
        most_bytes: int | None,
    ):
        """
        Args:
            folder: of the rows, for messages.
            files: the data files.
            record_bytes: of a record.
            other_bytes: tells what else of the folder is on the disk.
            most_saves, most_bytes: see `RowFile.create`.
        """
        self.files = files
        self.maps = PlaceMaps(files.capacity)
        self._folder = folder
        self._record_bytes = record_bytes
        self._other_bytes = other_bytes
        self._most_saves, self._most_bytes = most_saves, most_bytes

    @property
    def num_bytes(self) -> int:
        """Of disk that the folder takes."""
        return self.files.num_bytes + self._other_bytes()

    def take(self, count: int, num_rows: int) -> np.ndarray:
        """Free places, int64 [count], mostly ascending.

        Args:
            count: of places.
            num_rows: that are on disk; with all saves they may need so many places each.

        Raises:
            InputError: `most_bytes` are taken.
            OSError: the disk is full.
        """
        if (missing := count - self.maps.num_free) > 0:
            self._grow(missing)
        found = []
        while count:
            if self.maps.at_end:
                self._go_on(count, (1 + self._most_saves) * num_rows)
            found.append(self.maps.take(count))
            count -= len(found[-1])
        return np.concatenate([np.zeros(0, np.int64), *found])

    def cut(self) -> None:
        """Removes files that nobody needs."""
        self.files.cut(self.maps.last_needed() + 1)
        self.maps.set_capacity(self.files.capacity)

    @contextlib.contextmanager
    def refused(self, wanted: int) -> Iterator[None]:
        """A full disk as an InputError. wanted: bytes that are to be written."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise self._full(wanted, error.strerror or "no space left") from error

    def _go_on(self, count: int, most_places: int) -> None:
        """Behind the last place: new room, if all may need it one day, or the first place."""
        dense = 2 * self.maps.num_free < self.maps.capacity
        if dense and self.maps.capacity + count <= most_places:
            # Writing behind the end costs the least; but there is room without.
            with contextlib.suppress(InputError), self.refused(0):
                self._grow(count, most_places)
                return
        self.maps.rewind()

    def _grow(self, places: int, most_places: int = _MOST_PLACES) -> None:
        wanted = places * self._record_bytes
        if self.files.capacity + places > _MOST_PLACES:
            raise self._full(wanted, f"there are {_MOST_PLACES} places at most")
        if self._most_bytes is not None:
            room = (self._most_bytes - self._other_bytes()) // self._record_bytes
            if self.files.capacity + places > room:
                raise self._full(wanted, f"{self._most_bytes} bytes are allowed")
            most_places = min(most_places, room)
        goal = self.files.capacity + places
        try:
            self.files.grow(self.files.step(places, most_places))
        except OSError as error:
            if error.errno not in FULL:
                raise
            # The last of the disk is less than a step.
            self.files.grow(goal - self.files.capacity)
        finally:
            self.maps.set_capacity(self.files.capacity)

    def _full(self, wanted: int, reason: str) -> InputError:
        return full_disk(self._folder, self.num_bytes, wanted, reason)
