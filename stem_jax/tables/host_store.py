"""A table in host memory, logical: this process's shards, with room for every row of each.

The device holds some rows, the store all of them; the copy here of a row that is on the device is
stale until it is written back. A checkpoint is then the store alone, once all rows are back.

With 8 rows, 4 columns, two row shards and tensor parallelism of two, a process that has all four
devices holds four blocks:

    block   shard   row_range   column_range
    0       0       0..3        0..1
    1       0       0..3        2..3
    2       1       4..7        0..1
    3       1       4..7        2..3

Of a table of hashed keys a block keeps the rows that were written once (`kept_rows`); others are
made when they are asked for (`first_rows`), so that a start costs nothing for the rows to come.
"""

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_block import Arrays, HostBlock, local_blocks
from stem_jax.tables.host_memory import available_host_bytes, check_host_memory
from stem_jax.tables.kept_rows import KeptRows, reserved
from stem_jax.tables.spec import (
    LAST_STEP,
    Field,
    TableSpec,
    logical,
    stored,
    stored_shape,
    table_shardings,
)
from stem_jax.tables.store_snapshot import StoreSnapshot, kept_bytes
from stem_jax.tables.whole_rows import put_rows

# Rows that are made at a time where all are.
_MADE_ROWS = 2**14
# Of a row that is kept: its number, and its entries in an index half to a quarter full.
_BOOK_BYTES = 36

# Of one shard or of all: the fields of a `TableState`, or some of them.
DeviceArrays = dict[str, jax.Array]


class HostStore:
    """This process's part of a table. `gather` and `write` may run in several threads at once.

    Attributes:
        spec: the table.
        blocks: by row range, then by column range.
        fields: names of the arrays that each block has.
        first: how rows are made that no block keeps; None where all are kept.
    """

    def __init__(
        self, spec: TableSpec, blocks: tuple[HostBlock, ...], first: FirstRows | None = None
    ):
        self.spec = spec
        self.blocks = blocks
        self.fields = tuple(blocks[0].arrays)
        self.first = first
        self._changed = threading.Condition()
        self._writes_under_way = 0
        self._snapshot: StoreSnapshot | None = None

    @classmethod
    def allocate(cls, spec: TableSpec, mesh: Mesh, *, moments: bool = True) -> "HostStore":
        """A store of zeros, whose memory the system provides when it is first written to.

        Args:
            spec: the table.
            mesh: where the device side of the table lies.
            moments: with what the optimizer keeps of rows, as training needs them.

        Raises:
            InputError: the host has too little memory.
        """
        needed = cls.peak_bytes if moments else functools.partial(cls.needed_bytes, moments=False)
        check_host_memory(needed(spec, mesh), available_host_bytes(), specs=[spec])
        return cls.zeros(spec, mesh, moments=moments)

    @classmethod
    def zeros(cls, spec: TableSpec, mesh: Mesh, *, moments: bool = True) -> "HostStore":
        """What `allocate` gives, unchecked: for a table that only passes on its way to devices."""
        make = np.zeros
        return cls(spec, _with_arrays(spec, mesh, moments, make, lambda rows: None))

    @classmethod
    def empty(
        cls, spec: TableSpec, mesh: Mesh, first: FirstRows, *, moments: bool = True
    ) -> "HostStore":
        """A store that keeps no row yet, unchecked: it takes memory as rows are written."""
        return cls(spec, _with_arrays(spec, mesh, moments, reserved, KeptRows), first)

    @classmethod
    def copy_of(cls, spec: TableSpec, mesh: Mesh, table: DeviceArrays) -> "HostStore":
        """A copy of a table of resident rows: of what this process saves, zeros elsewhere."""
        store = cls.zeros(spec, mesh)
        saved = [
            {n: shards_on(table, block.devices[0])[n] for n in store.fields if _copied(block, n)}
            for block in store.blocks
        ]
        for array in (array for shards in saved for array in shards.values()):
            array.copy_to_host_async()
        for block, shards in zip(store.blocks, saved, strict=True):
            for name, array in shards.items():
                # On CPUs that may be the device's own memory, which the next step writes to.
                own = np.array(array, copy=_is_cpu(mesh) or None)
                block.arrays[name] = logical(own)
        return store

    @classmethod
    def create(
        cls, spec: TableSpec, key: jax.Array, mesh: Mesh, *, moments: bool = True
    ) -> "HostStore":
        """A store of fresh rows, those that `init_table` makes for the same key.

        Of hashed keys all rows are still to be made; of others they are, a piece at a time.

        Raises:
            InputError: the host has too little memory, or JAX has no CPU backend.
        """
        first = FirstRows.of(spec, key)
        if spec.made_when_asked:
            return cls.empty(spec, mesh, first, moments=moments)
        store = cls.allocate(spec, mesh, moments=moments)
        store.fill(first)
        return store

    def keep_all(self) -> None:
        """Has a place for every row at its own number, before they are read in."""
        for kept in {id(b.kept): b.kept for b in self.blocks if b.kept is not None}.values():
            kept.keep_all()

    def fill(self, first: FirstRows) -> None:
        """Makes all rows, of a store that keeps all."""
        for row_range in dict.fromkeys(block.row_range for block in self.blocks):
            for start in range(0, len(row_range), _MADE_ROWS):
                part = row_range[start : start + _MADE_ROWS]
                piece = first.made(self.spec, np.arange(part.start, part.stop))
                for block in self.blocks:
                    if block.row_range == row_range:
                        columns = slice(block.column_range.start, block.column_range.stop)
                        block.arrays["rows"][start : start + len(part)] = piece[:, :, columns]

    @staticmethod
    def needed_bytes(
        spec: TableSpec, mesh: Mesh, *, moments: bool = True, rows: int | None = None
    ) -> int:
        """Bytes that a store takes in this process, before there is one.

        rows: of the whole table that are kept at most, where rows are made when they are asked for.
        """
        blocks = local_blocks(spec, mesh)
        if not spec.made_when_asked or rows is None:
            return sum(
                math.prod(_block_shape(spec, block, field)) * np.dtype(field.dtype).itemsize
                for block in blocks
                for field in _fields(spec, moments)
            )
        # Hashes fall on all shards alike; their numbers, and where they are found, come with rows.
        share = min(rows, spec.num_rows, spec.host_rows or spec.num_rows) / spec.num_rows
        whole = HostStore.needed_bytes(spec, mesh, moments=moments)
        return math.ceil(share * (whole + _BOOK_BYTES * sum(len(b.row_range) for b in blocks)))

    @classmethod
    def peak_bytes(cls, spec: TableSpec, mesh: Mesh, rows: int | None = None) -> int:
        """Bytes of a store with moments while it is saved and goes on changing."""
        needed = cls.needed_bytes(spec, mesh, rows=rows)
        return needed + (0 if spec.on_disk else kept_bytes(needed))

    def on_devices(self, mesh: Mesh) -> DeviceArrays:
        """The whole table on the devices, field by field; the store is empty after that."""
        shardings = vars(table_shardings(self.spec, mesh))
        found: DeviceArrays = {}
        for name in self.fields:
            shards = []
            for block in self.blocks:
                array = np.ascontiguousarray(stored(block.arrays.pop(name)))
                shards += [jax.device_put(array, device) for device in block.devices]
            shape = stored_shape(self.spec.shape(name))
            found[name] = jax.make_array_from_single_device_arrays(shape, shardings[name], shards)
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(array.nbytes for block in self.blocks for array in block.used().values())

    def gather(self, block: HostBlock, rows: np.ndarray, out: Arrays) -> None:
        """Copies rows of every field into staging buffers.

        Args:
            block: of this store.
            rows: [n] integers, numbers within the block.
            out: by field, C-contiguous [>= n, ...] of the field's dtype; the first n are filled.

        Raises:
            IndexError: a number is not within the block.
        """
        _check_rows(block, rows)
        if block.tier is not None:
            block.tier.gather(rows, out, functools.partial(self._made, block))
            return
        places, missing = rows, np.empty(0, np.int64)
        if block.kept is not None:
            places = block.kept.find(rows)
            missing = np.flatnonzero(places < 0)
        for name, array in block.arrays.items():
            # mode="clip" copies straight into `out`, with the GIL released.
            np.take(array, places, axis=0, out=out[name][: len(rows)], mode="clip")
        if len(missing):
            for name, made in self._made(block, rows[missing]).items():
                out[name][missing] = made

    def _made(self, block: HostBlock, rows: np.ndarray) -> Arrays:
        """Rows of a block that nobody has written, by field."""
        assert self.first is not None, "rows that are not kept can be made"
        arrays = block.arrays.items()
        made = {
            name: np.zeros((len(rows), *array.shape[1:]), array.dtype) for name, array in arrays
        }
        columns = slice(block.column_range.start, block.column_range.stop)
        first = self.first.made(self.spec, rows + block.row_range.start)
        made["rows"][:] = first[:, :, columns]
        return made

    def write(self, block: HostBlock, rows: np.ndarray, values: Arrays) -> None:
        """Stores rows that came back from the device. Waits where a snapshot's reader is behind.

        Args:
            block: of this store.
            rows: [n] distinct integers, numbers within the block.
            values: by field, [>= n, ...]; the first n are stored.

        Raises:
            IndexError: a number is not within the block.
        """
        _check_rows(block, rows)
        if block.tier is not None:
            block.tier.write(rows, values)
            return
        with self._writing() as snapshot:
            places = block.places(rows)
            if snapshot is not None:
                snapshot.keep(block.index, places)
            for name, array in block.arrays.items():
                put_rows(array, places, values[name][: len(rows)])

    def close(self) -> None:
        """Gives back what is open; memory alone needs nothing."""

    def take_counts(self) -> dict[str, int]:
        """Metrics of rows that are not in memory, since the last call; here there are none."""
        return {}

    def snapshot(self, since: int | None = None) -> StoreSnapshot:
        """The store at this moment, for a save that runs while `write` goes on.

        Args:
            since: updates; of the rows that none after these had, nothing will be read. None: of
                all rows that are kept.

        Raises:
            RuntimeError: the snapshot before is still open.
            ValueError: a store without moments is not what a checkpoint holds.
        """
        if self.fields != (needed := tuple(field.name for field in self.spec.fields)):
            raise ValueError(
                f"a checkpoint needs the fields {needed}, this store has {self.fields}"
            )
        with self._changed:
            if self._snapshot is not None and not self._snapshot.closed:
                raise RuntimeError("a snapshot of this store is open; close it first")
            # A write that began without a snapshot keeps nothing for this one.
            self._changed.wait_for(lambda: not self._writes_under_way)
            self._snapshot = StoreSnapshot(
                [block.used() for block in self.blocks],
                [block.saved for block in self.blocks],
                None if since is None else [_updated_after(b, since) for b in self.blocks],
            )
            return self._snapshot

    @contextlib.contextmanager
    def _writing(self) -> Iterator[StoreSnapshot | None]:
        """The open snapshot; none is opened meanwhile."""
        with self._changed:
            self._writes_under_way += 1
            if self._snapshot is not None and self._snapshot.closed:
                self._snapshot = None
            snapshot = self._snapshot
        try:
            yield snapshot
        finally:
            with self._changed:
                self._writes_under_way -= 1
                self._changed.notify_all()


def _copied(block: HostBlock, name: str) -> bool:
    """Whether a field of a block is saved, or says which of its rows are."""
    return name in block.saves or (name == LAST_STEP and bool(block.saves))


def shards_on(arrays: DeviceArrays, device: jax.Device) -> DeviceArrays:
    """The shard of each array that a device of this process has."""
    return {
        name: next(shard.data for shard in array.addressable_shards if shard.device == device)
        for name, array in arrays.items()
    }


def _updated_after(block: HostBlock, updates: int) -> np.ndarray:
    """[n] int64, ascending: the places of rows that a later update had; of frozen ones, none."""
    last_step = block.used().get(LAST_STEP, np.zeros(0, np.int32))
    return np.flatnonzero(last_step > updates)


def _fields(spec: TableSpec, moments: bool) -> tuple[Field, ...]:
    return spec.fields if moments else (spec.field("rows"),)


def _block_shape(spec: TableSpec, block: HostBlock, field: Field) -> tuple[int, ...]:
    return spec.shape(field.name, len(block.row_range), len(block.column_range))


def _with_arrays(
    spec: TableSpec,
    mesh: Mesh,
    moments: bool,
    make: Callable[..., np.ndarray],
    keep: Callable[[int], KeptRows | None],
) -> tuple[HostBlock, ...]:
    return tuple(
        dataclasses.replace(
            block,
            kept=keep(len(block.row_range)),
            arrays={
                field.name: make(_block_shape(spec, block, field), np.dtype(field.dtype))
                for field in _fields(spec, moments)
            },
        )
        for block in local_blocks(spec, mesh)
    )


def _is_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _check_rows(block: HostBlock, rows: np.ndarray) -> None:
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(block.row_range):
        raise IndexError(
            f"rows {rows.min()}..{rows.max()} are not all within the {len(block.row_range)} rows "
            f"of block {block.index}"
        )
