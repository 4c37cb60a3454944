"""A host store as it is at one moment, read piece by piece while the store goes on changing.

Nothing is copied beforehand. A row that is overwritten before the reader has come to its piece
keeps its old values aside; the reader copies a piece and then patches it with what was kept:

    pieces of a field      0         1         2         3
    reader                 done      done      <- next
    write of a row in      nothing   nothing   old values are kept, once, until the piece is read

A snapshot of some rows has pieces of these alone; writes to others are none of its business.
"""

import dataclasses
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

# Beside the fields of rows that lie at places of their own: the row at each place, int32.
NUMBERS = "numbers"
# A chunk is what a checkpoint stores as one value; a piece is what is copied and written at a time,
# whole chunks. Some pieces are in flight at once, each in a buffer and, compressed, in another.
_CHUNK_BYTES = 2**24
_PIECE_BYTES = 2**24
# Rows kept aside take at most this part of the store; then writes wait for the reader.
_KEPT_PART = 16
_KEPT_LEAST_BYTES = 2**26
# A reader that gets nowhere for so long has failed; training does not wait for it any longer.
_PATIENCE_SECONDS = 60.0


def chunk_rows(num_rows: int, row_bytes: int) -> int:
    """Rows of a chunk: all of a small shard, else the largest part that divides the shard evenly.

    Even division keeps chunks within shards, so that no two processes write to one.
    """
    if num_rows * row_bytes <= _PIECE_BYTES:
        return num_rows
    most = max(1, _CHUNK_BYTES // row_bytes)
    return next(rows for rows in range(min(most, num_rows), 0, -1) if num_rows % rows == 0)


def few_chunk_rows(row_bytes: int) -> int:
    """Rows of a chunk of some rows of a shard, whose number changes; chunks end with the shard."""
    return max(1, _CHUNK_BYTES // row_bytes)


def kept_bytes(store_bytes: int) -> int:
    """Memory that a snapshot may take beside a store of this size."""
    return max(store_bytes // _KEPT_PART, _KEPT_LEAST_BYTES)


@dataclasses.dataclass
class _Track:
    """One array of one block: how far it has been read, and the old rows kept for the rest.

    chosen: [n] int64, ascending: the places that are read, which is then all there is; None: all.
    """

    array: np.ndarray
    chosen: np.ndarray | None
    piece_rows: int
    next_piece: int = 0
    # By piece, then by row, as they are counted: the place on the shelf, and the old values.
    kept: dict[int, dict[int, tuple[int | None, np.ndarray]]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def num_pieces(self) -> int:
        return -(-len(self.array if self.chosen is None else self.chosen) // self.piece_rows)

    def endangered(self, places: np.ndarray) -> Iterator[tuple[int, int]]:
        """(piece, row) of those places whose old values are needed and not yet kept."""
        if self.chosen is None:
            # What came later than the snapshot lies past the end.
            rows = places[places < len(self.array)]
        else:
            rows = np.searchsorted(self.chosen, places)
            inside = np.flatnonzero(rows < len(self.chosen))
            rows = rows[inside[self.chosen[rows[inside]] == places[inside]]]
        pieces = rows // self.piece_rows
        unread = pieces >= self.next_piece
        for piece, row in zip(pieces[unread].tolist(), rows[unread].tolist()):
            if row not in self.kept.get(piece, ()):
                yield piece, row

    def now(self, row: int) -> np.ndarray:
        """A row as it is."""
        return self.array[row if self.chosen is None else self.chosen[row]]

    def copy(self, first: int) -> np.ndarray:
        """A piece as it is."""
        part = slice(first, first + self.piece_rows)
        # By places, it is a copy already.
        return self.array[part].copy() if self.chosen is None else self.array[self.chosen[part]]


class _Shelf:
    """Room for rows kept aside: one allocation, so that it goes back to the system as a whole."""

    def __init__(self, rows: np.ndarray, most_bytes: int):
        count = max(1, most_bytes // _row_bytes(rows))
        self._rows = np.empty((count, *rows.shape[1:]), rows.dtype)
        self._free = list(range(len(self._rows)))

    def has_room(self, count: int) -> bool:
        """An empty shelf takes any number: what is too much for it will never fit."""
        return count <= len(self._free) or len(self._free) == len(self._rows)

    def put(self, row: np.ndarray) -> tuple[int | None, np.ndarray]:
        """The place of a copy, None for a copy off the shelf, and the copy."""
        if row.shape != self._rows.shape[1:] or not self._free:
            return None, row.copy()
        place = self._free.pop()
        self._rows[place] = row
        return place, self._rows[place]

    def clear(self, kept: dict[int, tuple[int | None, np.ndarray]]) -> None:
        """Takes back the places of these rows."""
        self._free += [place for place, _ in kept.values() if place is not None]


class StoreSnapshot:
    """The arrays of a store at the moment of creation. Reading and `keep` may run in any thread.

    Close it when it is no longer wanted, in case of an error too: until then writes keep old rows.
    """

    def __init__(
        self,
        arrays: list[dict[str, np.ndarray]],
        to_read: list[frozenset[str]],
        chosen: list[np.ndarray] | None = None,
    ):
        """
        Args:
            arrays: of each block, by field; with `NUMBERS`, of rows that do not change places.
            to_read: of each block, the fields that will be read.
            chosen: of each block, places [n] int64, ascending, of the rows that will be; None: all.
        """
        # Of what a checkpoint has then: rows beside their numbers.
        self.some = chosen is not None or NUMBERS in arrays[0]
        places: list[Any] = [None] * len(arrays) if chosen is None else chosen
        self._tracks = [
            {
                name: _track(block[name], of_block, self._chunk(block, name))
                for name in block
                if name in names and name != NUMBERS
            }
            for block, names, of_block in zip(arrays, to_read, places, strict=True)
        ]
        # They never change, so no piece of them is kept, nor read but once.
        self._numbers = [
            _numbers(block, of_block) if NUMBERS in names else None
            for block, names, of_block in zip(arrays, to_read, places, strict=True)
        ]
        # Rows of the fullest block.
        self.count = max(
            len(block["rows"] if of_block is None else of_block)
            for block, of_block in zip(arrays, places, strict=True)
        )
        self._unread = {name for block in self._tracks for name in block}
        self._changed = threading.Condition()
        total = sum(array.nbytes for block in arrays for array in block.values())
        # A number of a row, or one of each vector, is not worth a place on the shelf.
        # None once nothing is kept any more.
        self._kept_rows: _Shelf | None = _Shelf(arrays[0]["rows"], kept_bytes(total))
        self._stalled = False
        self.closed = False

    def pieces(self, block: int, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows of that moment) of a field, a fresh array for each piece.

        Raises:
            RuntimeError: the snapshot was closed.
        """
        numbers = self._numbers[block]
        if name == NUMBERS and numbers is not None:
            for first in range(0, len(numbers), _PIECE_BYTES // numbers.itemsize):
                yield first, numbers[first : first + _PIECE_BYTES // numbers.itemsize].copy()
        track = self._tracks[block].get(name)
        if track is not None:
            for piece in range(track.num_pieces):
                yield self._read(track, piece)

    def _chunk(self, block: dict[str, np.ndarray], name: str) -> int:
        if self.some:
            return few_chunk_rows(max(map(_row_bytes, block.values())))
        return chunk_rows(len(block[name]), _row_bytes(block[name]))

    @property
    def _shelf(self) -> "_Shelf":
        assert self._kept_rows is not None
        return self._kept_rows

    def finish(self, name: str) -> None:
        """Says that a field will not be read any further; the last one closes the snapshot."""
        with self._changed:
            for track in (block[name] for block in self._tracks if name in block):
                for kept in track.kept.values():
                    self._shelf.clear(kept)
                track.kept.clear()
                track.next_piece = track.num_pieces
            self._unread.discard(name)
            if not self._unread:
                self.closed = True
                # The last reference to the snapshot may stay for long.
                self._kept_rows = None
            self._changed.notify_all()

    def close(self) -> None:
        """Drops what was kept and lets waiting writes go on."""
        for name in tuple(self._unread):
            self.finish(name)

    def keep(self, block: int, rows: np.ndarray) -> None:
        """Saves the old values of rows, which the caller is about to overwrite.

        Waits while too much is kept: the reader is behind.
        """
        with self._changed:
            while new := [
                (track, piece, row)
                for track in self._tracks[block].values()
                for piece, row in track.endangered(rows)
            ]:
                places = sum(track.array.ndim > 2 for track, _, _ in new)
                # Nothing is worth a hang: without progress more is kept than was meant to be.
                if self._stalled or self._shelf.has_room(places):
                    break
                self._stalled = not self._changed.wait(_PATIENCE_SECONDS)
            for track, piece, row in new:
                track.kept.setdefault(piece, {})[row] = self._shelf.put(track.now(row))

    def _read(self, track: _Track, piece: int) -> tuple[int, np.ndarray]:
        with self._changed:
            if self.closed or piece != track.next_piece:
                raise RuntimeError(f"piece {piece} of a snapshot was asked for after its end")
            first = piece * track.piece_rows
            rows = track.copy(first)
            # A write may be under way in these rows: what it tears is patched.
            kept = track.kept.pop(piece, {})
            for row, (_, old) in kept.items():
                rows[row - first] = old
            self._shelf.clear(kept)
            track.next_piece += 1
            self._stalled = False
            self._changed.notify_all()
        return first, rows


def _track(array: np.ndarray, chosen: np.ndarray | None, chunk: int) -> _Track:
    return _Track(array, chosen, chunk * max(1, _PIECE_BYTES // (chunk * _row_bytes(array))))


def _numbers(block: dict[str, np.ndarray], chosen: np.ndarray | None) -> np.ndarray | None:
    numbers = block.get(NUMBERS)
    if chosen is None:
        return numbers
    return chosen.astype(np.int32) if numbers is None else numbers[chosen]


def _row_bytes(array: np.ndarray) -> int:
    return array.itemsize * math.prod(array.shape[1:])
