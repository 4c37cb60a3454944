"""Which places of the data files are needed, by what: one bit a place.

A place is needed by the live rows, by each save that is kept, and for a moment by readers that
looked it up before its row moved. Only places that nobody needs are written to.
"""

import numpy as np

_LEAST_SCAN, _MOST_SCAN = 2**12, 2**17
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


class PlaceMaps:
    """Bitmaps of places [0, capacity). Not for several threads at once.

    Attributes:
        capacity: places that the data files have room for.
        live: of the rows as they are now.
        saves: of each save.
    """

    def __init__(self, capacity: int = 0):
        self.capacity = 0
        self.live = np.zeros(0, np.uint8)
        self.saves: dict[str, np.ndarray] = {}
        self._saved = np.zeros(0, np.uint8)
        # Places that somebody needs, or that were given out and not yet given back.
        self._busy = np.zeros(0, np.uint8)
        self._num_busy = 0
        self._cursor = 0
        self.set_capacity(capacity)

    @property
    def num_free(self) -> int:
        """Places that nobody needs."""
        return self.capacity - self._num_busy

    @property
    def at_end(self) -> bool:
        """Whether the cursor has come to the last place."""
        return self._cursor >= self.capacity

    def set_capacity(self, capacity: int) -> None:
        """More places, or fewer: those beyond are free."""
        size = -(-capacity // 8)
        self.capacity = capacity
        self.live, self._saved, self._busy = (
            _resized(bits, size) for bits in (self.live, self._saved, self._busy)
        )
        self.saves = {name: bits[:size] for name, bits in self.saves.items()}
        self._cursor = min(self._cursor, capacity)

    def take(self, count: int) -> np.ndarray:
        """At most `count` free places, int64, ascending, from the cursor to the end."""
        found, missing = [], count
        while missing and self._cursor < self.capacity:
            # As many as there should be enough free ones among.
            density = max(self.num_free, 1) / self.capacity
            size = int(np.clip(missing / density / 8, _LEAST_SCAN, _MOST_SCAN))
            first = self._cursor // 8
            bits = np.unpackbits(self._busy[first : first + size], bitorder="little")
            places = np.flatnonzero(bits == 0) + 8 * first
            places = places[(places >= self._cursor) & (places < self.capacity)][:missing]
            missing -= len(places)
            end = 8 * (first + size) if missing else int(places[-1]) + 1
            self._cursor = min(end, self.capacity)
            found.append(places)
        taken = np.concatenate(found) if found else np.zeros(0, np.int64)
        _set(self._busy, taken)
        self._num_busy += len(taken)
        return taken

    def rewind(self) -> None:
        """Begins at the first place again."""
        self._cursor = 0

    def use(self, places: np.ndarray) -> None:
        """The places, which were taken, are those of live rows from now on."""
        _set(self.live, places)

    def leave(self, places: np.ndarray) -> None:
        """Live rows need the places no more; `free` has to be told when no reader does."""
        _clear(self.live, places)

    def free(self, places: np.ndarray) -> None:
        """Gives places back; those that a save needs stay."""
        places = places[~_are_set(self._saved, places)]
        _clear(self._busy, places)
        self._num_busy -= len(places)

    def keep(self, name: str) -> None:
        """The places of the live rows are needed by a save of this name, too."""
        self.put_save(name, self.live.copy())

    def put_save(self, name: str, bits: np.ndarray) -> None:
        """The bitmap of a save that is there; no place of it is beyond the capacity."""
        self.saves[name] = bits
        self._saved[: len(bits)] |= bits
        self._busy[: len(bits)] |= bits
        self._num_busy = _count(self._busy)

    def drop(self, name: str, waiting: np.ndarray) -> None:
        """Forgets a save. waiting: places that `leave` named and `free` did not yet."""
        del self.saves[name]
        self._saved[:] = 0
        for bits in self.saves.values():
            self._saved[: len(bits)] |= bits[: len(self._saved)]
        np.bitwise_or(self._saved, self.live, out=self._busy)
        _set(self._busy, waiting)
        self._num_busy = _count(self._busy)

    def go_to(self, name: str) -> None:
        """The live rows, of which there are none yet, are those of a save."""
        self.live[: len(self.saves[name])] = self.saves[name]

    def last_needed(self) -> int:
        """The last place that somebody needs; -1 for none."""
        for end in range(len(self._busy), 0, -_MOST_SCAN):
            first = max(0, end - _MOST_SCAN)
            at = np.flatnonzero(self._busy[first:end])
            if len(at):
                byte = first + int(at[-1])
                return 8 * byte + int(self._busy[byte]).bit_length() - 1
        return -1


def _resized(bits: np.ndarray, size: int) -> np.ndarray:
    more = np.zeros(size, np.uint8)
    more[: len(bits)] = bits[:size]
    return more


def _masks(places: np.ndarray) -> np.ndarray:
    return np.left_shift(1, places & 7).astype(np.uint8)


def _set(bits: np.ndarray, places: np.ndarray) -> None:
    np.bitwise_or.at(bits, places >> 3, _masks(places))


def _clear(bits: np.ndarray, places: np.ndarray) -> None:
    np.bitwise_and.at(bits, places >> 3, ~_masks(places))


def _are_set(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    return (bits[places >> 3] & _masks(places)) != 0


def _count(bits: np.ndarray) -> int:
    piece = 2**20
    return sum(
        int(_ONES[bits[first : first + piece]].sum(dtype=np.int64))
        for first in range(0, len(bits), piece)
    )
