"""Saves of a table on disk, opened to be read, however they are partitioned.

Each block of a process has a folder, whose name says where the block lies in the table:

    DISK/process-0/rows-0-199999-columns-0-23/
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stem_jax.tables.host_block import Arrays, HostBlock
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.row_folder import note_checksums, saved_rows
from stem_jax.tables.row_record import RowRecord
from stem_jax.tables.saved_rows import SavedRows
from stem_jax.tables.spec import TableSpec

# Rows that are read at a time.
_PIECE_ROWS = 2**14


@dataclasses.dataclass(frozen=True)
class DiskBlock:
    """A block on disk.

    process: that has it. rows, columns: [first, end) of the whole table. notes: of a save, see
    `row_folder.note_checksums`; empty where nobody noted them.
    """

    process: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    notes: tuple[int, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def of(cls, block: HostBlock) -> "DiskBlock":
        """A block of this process."""
        rows, columns = block.row_range, block.column_range
        return cls(jax.process_index(), (rows.start, rows.stop), (columns.start, columns.stop))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "DiskBlock":
        """The inverse of `dataclasses.asdict`, after JSON."""
        rows, columns = tuple(record["rows"]), tuple(record["columns"])
        return cls(record["process"], rows, columns, tuple(record.get("notes", ())))

    def noted(self, disk: str | Path, name: str) -> "DiskBlock":
        """With the notes of a save."""
        return dataclasses.replace(self, notes=note_checksums(self.folder(disk), name))

    def folder(self, disk: str | Path) -> Path:
        """Of its rows, below that of the table."""
        name = f"rows-{self.rows[0]}-{self.rows[1] - 1}"
        columns = f"columns-{self.columns[0]}-{self.columns[1] - 1}"
        return Path(disk) / f"process-{self.process}" / f"{name}-{columns}"

    def layout(
        self, spec: TableSpec, disk: str | Path
    ) -> tuple[Path, RowRecord, int, dict[str, Any]]:
        """Folder, record, number of rows and facts: what a `RowFile` of it begins with."""
        rows = self.rows[1] - self.rows[0]
        return self.folder(disk), self.record(spec), rows, self.facts(spec)

    def record(self, spec: TableSpec) -> RowRecord:
        """How its rows lie on disk."""
        return RowRecord.of(spec, self.columns[1] - self.columns[0])

    def facts(self, spec: TableSpec) -> dict[str, Any]:
        """What its rows depend on, beside their fields."""
        return {
            "table_rows": spec.num_rows,
            "multiplier": spec.layout.multiplier,
            "rows": list(self.rows),
            "columns": list(self.columns),
        }


@dataclasses.dataclass(frozen=True)
class SavedDisk:
    """A save of a table. folder: of the table. name: of the save. blocks: of all processes."""

    folder: str
    name: str
    blocks: tuple[DiskBlock, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "SavedDisk":
        """The inverse of `dataclasses.asdict`, after JSON."""
        blocks = tuple(DiskBlock.from_record(block) for block in record["blocks"])
        return cls(record["folder"], record["name"], blocks)

    def parts(self, spec: TableSpec, block: HostBlock) -> Iterator["SavedPart"]:
        """What has rows of a block; each is to be closed.

        Raises:
            InputError: there is no such save, or one of another layout.
        """
        # Copies of a block are equal.
        for part in {(b.rows, b.columns): b for b in self.blocks}.values():
            columns = _common(range(*part.columns), block.column_range)
            if columns and _common(range(*part.rows), block.row_range):
                saved = saved_rows(*part.layout(spec, self.folder), self.name)
                yield SavedPart(part, part.record(spec), saved, columns)


@dataclasses.dataclass(frozen=True)
class SavedPart:
    """A block of a save, open. columns: that are wanted, of the whole table."""

    block: DiskBlock
    record: RowRecord
    saved: SavedRows
    columns: range

    def read(self, rows: np.ndarray) -> Arrays:
        """The wanted columns of rows that it has, numbers within its block, by field."""
        values = dict(self.record.empty(len(rows)))
        self.saved.read(rows, values)
        first = self.block.columns[0]
        wanted = slice(self.columns.start - first, self.columns.stop - first)
        return {n: array[:, :, wanted] if array.ndim > 2 else array for n, array in values.items()}


def pour_saved(spec: TableSpec, saved: SavedDisk, store: HostStore) -> None:
    """Copies the rows of a save into a store in memory, however either is partitioned.

    Args:
        spec: of the table that was saved.
        saved: where it lies.
        store: of the same table, with the fields that it wants.

    Raises:
        InputError: there is no such save, one of another layout, or a record that is not whole.
    """
    for block in store.blocks:
        for part in saved.parts(spec, block):
            with contextlib.closing(part.saved):
                _pour_part(part, block)


def _pour_part(part: SavedPart, block: HostBlock) -> None:
    columns = _within(part.columns, block.column_range)
    for first in range(0, part.saved.count, _PIECE_ROWS):
        rows = part.saved.rows[first : first + _PIECE_ROWS].astype(np.int64)
        number = rows + part.block.rows[0] - block.row_range.start
        mine = (number >= 0) & (number < len(block.row_range))
        if not mine.any():
            continue
        values, places = part.read(rows[mine]), block.places(number[mine])
        for name, array in block.arrays.items():
            if array.ndim > 2:
                array[places, :, columns] = values[name]
            else:
                array[places] = values[name]


class SavedTier:
    """Rows of a save as a block's, to read."""

    def __init__(self, spec: TableSpec, saved: SavedDisk, block: HostBlock):
        self._block = block
        self._parts = list(saved.parts(spec, block))

    def gather(self, rows: np.ndarray, out: Arrays, make) -> None:
        """See `RowTiers.gather`."""
        unknown = np.ones(len(rows), bool)
        for part in self._parts:
            numbers = rows + self._block.row_range.start - part.block.rows[0]
            at = np.flatnonzero(
                (numbers >= 0) & (numbers < part.block.rows[1] - part.block.rows[0])
            )
            at = at[part.saved.known(numbers[at])]
            columns = _within(part.columns, self._block.column_range)
            for name, array in part.read(numbers[at]).items():
                if array.ndim > 2:
                    out[name][at, :, columns] = array
                else:
                    out[name][at] = array
            unknown[at] = False
        at = np.flatnonzero(unknown)
        for name, array in make(rows[at]).items():
            out[name][at] = array

    def write(self, rows: np.ndarray, values: Arrays) -> None:
        """Nothing is written to a save."""
        raise RuntimeError("rows of a save are there to be read")

    def close(self) -> None:
        """Closes the files."""
        for part in self._parts:
            part.saved.close()


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
