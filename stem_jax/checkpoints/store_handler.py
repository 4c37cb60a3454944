"""How Orbax writes and reads a host store: in its own array format, piece by piece.

Orbax hands each leaf of a tree to a handler for its type. This one takes the fields of a store and
writes chunks of the whole table's arrays, as Orbax writes sharded jax.Arrays, so that either can be
restored from what the other saved. Reading fills the store in place.

Of a store that keeps some rows alone, these are written, each row shard's in the order in which
they came, with room for as many as the shard with the most has; `numbers` has 1 + the row at each
place, 0 where there is none:

    place       0  1  2  3 | 4  5  6  7
    numbers     8  3  1  0 | 10 0  0  0      shard 0 keeps rows 7 2 0, shard 1 keeps row 9
"""

import asyncio
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from stem_jax.checkpoints.array_pieces import PieceHandler, opened_to_write, write_piece
from stem_jax.tables.host_block import HostBlock
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.store_snapshot import NUMBERS, StoreSnapshot, chunk_rows, few_chunk_rows

# Pieces of an item that are read or written at a time.
_IN_FLIGHT = 2
_READ_BYTES = 2**25

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class StoreField:
    """A leaf: one array of the whole table, in this process's part of it.

    snapshot: what to save; None to restore into the store. room: of each row shard, where some
    rows alone are saved.
    """

    store: HostStore
    name: str
    snapshot: StoreSnapshot | None = None
    room: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As a checkpoint has it."""
        spec = self.store.spec
        rows = spec.num_rows
        if self.room is not None:
            rows = self.room * (rows // len(self.store.blocks[0].row_range))
        return (rows,) if self.name == NUMBERS else spec.shape(self.name, rows)

    @property
    def dtype(self) -> np.dtype:
        """Of the field."""
        return np.dtype(
            np.int32 if self.name == NUMBERS else self.store.spec.field(self.name).dtype
        )

    @property
    def chunk(self) -> tuple[int, ...]:
        """What is stored as one value; no two shards have a part in it."""
        shard = self.shape[1:]
        block = self.store.blocks[0]
        if len(shard) > 1:
            shard = (*shard[:-1], len(block.column_range))
        if self.room is None:
            rows = len(block.row_range)
            return chunk_rows(rows, self.dtype.itemsize * math.prod(shard)), *shard
        return min(self.room, few_rows_of(self.store)), *shard

    def place(self, block: HostBlock, first: int, size: int) -> Index:
        """Where rows lie that are at these places of a block."""
        begin = block.row_range.start if self.room is None else block.shard * self.room
        rows = _within(range(begin + first, begin + first + size))
        return (rows, slice(None), _within(block.column_range))[: len(self.shape)]


def few_rows_of(store: HostStore) -> int:
    """Rows of a chunk of every field of a store that keeps some rows alone."""
    return few_chunk_rows(max(_row_bytes(array) for array in store.blocks[0].used().values()))


@dataclasses.dataclass
class StoreRestoreArgs(ocp.RestoreArgs):
    """Says where a leaf is restored to."""

    field: StoreField | None = None

    def __post_init__(self):
        self.restore_type = StoreField


def store_args(item: dict[str, StoreField]) -> ocp.args.PyTreeRestore:
    """Restores these fields into their stores."""
    args = {name: StoreRestoreArgs(field=field) for name, field in item.items()}
    return ocp.args.PyTreeRestore(item=item, restore_args=args)


class StoreFieldHandler(PieceHandler):
    """Writes the fields of stores, and reads into them."""

    async def serialize(
        self,
        values: Sequence[StoreField],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ):
        del args

        async def write_all():
            try:
                for field, info in zip(values, infos, strict=True):
                    await _write(field, info)
            finally:
                for field in values:
                    field.snapshot.finish(field.name)

        # Starts a thread, and waits there for Orbax to create the folders.
        return [CommitFutureAwaitingContractedSignals(write_all(), name="host_store")]

    async def deserialize(
        self,
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[StoreRestoreArgs] | None = None,
    ) -> Sequence[StoreField]:
        fields = [arg.field for arg in args or () if arg.field is not None]
        infos_of = dict(zip((field.name for field in fields), infos, strict=True))
        for field in fields:
            if NUMBERS not in infos_of:
                await _read(field, infos_of[field.name])
            elif field.name != NUMBERS:
                await _read_some(field, infos_of[field.name], infos_of[NUMBERS])
        return fields


async def _write(field: StoreField, info: type_handlers.ParamInfo) -> None:
    target = await opened_to_write(info, field.shape, field.chunk, field.dtype)
    await _a_few_at_a_time(
        write_piece(target, field.place(block, first, len(rows)), rows)
        for block in field.store.blocks
        for first, rows in _pieces(field, block)
    )


def _pieces(field: StoreField, block: HostBlock) -> Iterator[tuple[int, np.ndarray]]:
    """(first place, what a checkpoint has there) of what this process saves of a block."""
    assert field.snapshot is not None
    empty = field.room is not None and block.shard == 0
    for first, rows in field.snapshot.pieces(block.index, field.name):
        empty = False
        yield first, rows + (block.row_range.start + 1) if field.name == NUMBERS else rows
    if empty and field.name in block.saved:
        # An array without a chunk would look like one that was forgotten.
        yield 0, np.zeros((1, *field.chunk[1:]), field.dtype)


async def _open(info: type_handlers.ParamInfo, *, whole: bool) -> ts.TensorStore:
    """whole: every chunk was written; else those that were not are zeros."""
    await info.await_path_creation()
    spec = type_handlers.get_json_tspec_read(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        raise_array_data_missing_error=whole and info.raise_array_data_missing_error,
    )
    return await ts.open(ts.Spec(spec), open=True, context=info.ts_context)


async def _read(field: StoreField, info: type_handlers.ParamInfo) -> None:
    source = await _open(info, whole=True)
    if (source.shape, source.dtype.numpy_dtype) != (field.shape, field.dtype):
        raise ValueError(
            f"{info.name} is {source.dtype.name} {source.shape}, not {field.dtype} {field.shape}"
        )
    shape = source.chunk_layout.read_chunk.shape or ()
    chunk = tuple(int(size) for size in shape if size is not None)

    async def read(array: np.ndarray, place: Index) -> None:
        await ts.array(array).write(source[place])

    await _a_few_at_a_time(
        read(block.arrays[field.name][part], place)
        for block in field.store.blocks
        for part, place in _parts(block, field.name, chunk)
    )


async def _read_some(
    field: StoreField, info: type_handlers.ParamInfo, numbers: type_handlers.ParamInfo
) -> None:
    """Reads those rows of a checkpoint of some rows that lie on this process."""
    source, numbered = await _open(info, whole=False), await _open(numbers, whole=False)
    wanted = field.shape[1:], field.dtype
    if (source.shape[1:], source.dtype.numpy_dtype) != wanted or numbered.shape != source.shape[:1]:
        raise ValueError(f"{info.name} is {source.dtype.name} {source.shape}, not rows of {wanted}")
    shape = source.chunk_layout.read_chunk.shape or ()
    chunk = int(shape[0] or 1)
    row_bytes = field.dtype.itemsize * math.prod(field.shape[1:])
    step = chunk * max(1, _READ_BYTES // (chunk * row_bytes))

    async def read(rows: slice) -> None:
        found = (await numbered[rows].read()).astype(np.int64) - 1
        blocks = [(b, _inside(found, b.row_range)) for b in field.store.blocks]
        if not any(mine.any() for _, mine in blocks):
            return
        values = await source[rows].read()
        for block, mine in blocks:
            places = block.places(found[mine] - block.row_range.start)
            columns = slice(block.column_range.start, block.column_range.stop)
            part = values[mine]
            block.arrays[field.name][places] = part[:, :, columns] if part.ndim > 2 else part

    await _a_few_at_a_time(
        read(slice(first, min(first + step, source.shape[0])))
        for first in range(0, source.shape[0], step)
    )


def _inside(rows: np.ndarray, row_range: range) -> np.ndarray:
    return (rows >= row_range.start) & (rows < row_range.stop)


def _row_bytes(array: np.ndarray) -> int:
    return array.itemsize * math.prod(array.shape[1:])


def _parts(block: HostBlock, name: str, chunk: tuple[int, ...]) -> Iterator[tuple[Index, Index]]:
    """(place in the block, place in the table) of parts that end where the table's chunks end.

    A chunk that is read in two parts would be decompressed twice.
    """
    row_bytes = block.arrays[name][:1].nbytes
    for rows in _cut(block.row_range, chunk[0], _READ_BYTES // row_bytes):
        if (dimensions := block.arrays[name].ndim) < 3:
            here, there = ((_within(rows, of), slice(None)) for of in (block.row_range, range(0)))
            yield here[:dimensions], there[:dimensions]
            continue
        narrow = len(rows) * row_bytes > _READ_BYTES
        for columns in _cut(block.column_range, chunk[2], 1 if narrow else block.column_range.stop):
            yield (
                (_within(rows, block.row_range), slice(None), _within(columns, block.column_range)),
                (_within(rows), slice(None), _within(columns)),
            )


def _cut(whole: range, chunk: int, most: int) -> list[range]:
    """Parts of a range that end at multiples of the chunk, of up to `most`, but one chunk."""
    step = chunk * max(1, most // chunk)
    ends = [*range((whole.start // step + 1) * step, whole.stop, step), whole.stop]
    return [range(start, stop) for start, stop in zip([whole.start, *ends], ends)]


def _within(part: range, whole: range = range(0)) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


async def _a_few_at_a_time(operations) -> None:
    """Runs coroutines from a generator, which makes the next one when there is room for it."""
    running: set[asyncio.Task] = set()
    try:
        for operation in operations:
            running.add(asyncio.ensure_future(operation))
            if len(running) == _IN_FLIGHT:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        await asyncio.gather(*running)
    finally:
        # On an error: nothing may still write to a folder, or into a store, that is given up.
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
