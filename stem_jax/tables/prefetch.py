"""Rows on their way between host memory and the devices, under the steps that compute.

For each batch a ticket says which rows must enter which slots. Worker threads gather the missing
rows from the store into fresh staging buffers and start their transfer; `apply` then swaps them
into their slots, between two steps, and the rows that leave travel back on another thread.

A row lives in exactly one place at a time. While it travels back its copy in the store is stale,
so whoever wants it next waits for the ticket that took it away: tickets are applied in the order in
which they were made, so that wait ends.

Optimizer arithmetic never happens here: rows and moments are only copied.
"""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stem_jax.errors import InputError
from stem_jax.mesh import axis_size
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.host_block import Arrays, HostBlock, owners_here
from stem_jax.tables.host_store import DeviceArrays, HostStore, shards_on
from stem_jax.tables.row_slots import Move, RowSlots, move_sizes
from stem_jax.tables.slot_shards import SlotShards
from stem_jax.tables.spec import TableSpec, logical, stored, table_shardings

# Bytes that one thread copies at a time, and that filling and writing back whole shards take.
_PIECE_BYTES = 2**25
_MAX_THREADS = 8
_POLL_SECONDS = 5e-4


@dataclasses.dataclass(eq=False)
class Ticket:
    """The rows of one batch, from the choice of their slots to the return of those that left.

    number: in the order of choice. move: which rows. staged: the rows that enter, on the devices;
    None without any, and once they are in their slots. returned: done when the store has the rows
    that left. seconds: that gathering and transfer took, once it is staged.
    """

    number: int
    move: Move
    staged: Future | None
    returned: Future
    seconds: float = 0.0


class Prefetch:
    """Moves rows between a store and the slots on the devices of this process.

    The device side is a dictionary of the store's fields as a `TableState` has them, with R rows;
    `apply` takes it and gives back its successor. What travels is logical. Close it, or use it as a
    context: it has threads.
    """

    def __init__(
        self, mesh: Mesh, store: HostStore, policy: str, ahead: int, *, read_only: bool = False
    ):
        """Starts with the rows of the lowest keys in the slots, see `load`.

        Args:
            mesh: with the devices that hold the slots.
            store: the table on the host.
            policy: of the caches, see `RowCache`.
            ahead: tickets that are gathered at a time while others compute.
            read_only: rows do not change on the devices, so those that leave need not travel back.
        """
        self.store = store
        self.spec: TableSpec = store.spec
        self._mesh = mesh
        self._owners = axis_size(mesh, self.spec.vocab_axes)
        self._slots_per_owner = self.spec.num_slots // self._owners
        self._slots = RowSlots(self.spec, self._owners, policy, owners_here(self.spec, mesh))
        self._shards = SlotShards(mesh, self.spec, store.fields)
        self._owner_of = {d: block.shard for block in store.blocks for d in block.devices}
        self._numbers = 0
        self._stall = 0.0
        self._held = {block.shard: self._slots.held(block.shard) for block in store.blocks}
        # Slots that batches have asked for since the store was brought up to date.
        self._asked = {shard: np.zeros(len(held), bool) for shard, held in self._held.items()}
        # Tickets whose rows have not all travelled back.
        self._under_way: dict[int, Ticket] = {}
        self._waiting: deque[Ticket] = deque()
        self._returning: deque[Future] = deque()
        self._ahead = ahead
        self._read_only = read_only
        self._piece_rows = max(1, min(_PIECE_BYTES // self.row_bytes, self._slots_per_owner))
        # CPUs start programs as threads are free: a step dispatched after a swap would keep the
        # rows that leave until it ends.
        self._out_of_order = mesh.devices.flat[0].platform == "cpu"
        # Returning rows waits for nothing but the device, so gathering may wait for it.
        copiers = max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))
        self._copiers = ThreadPoolExecutor(copiers, "rows-copy")
        self._stagers = ThreadPoolExecutor(max(1, ahead), "rows-stage")
        self._returners = ThreadPoolExecutor(1, "rows-return")
        of_table = vars(table_shardings(self.spec, mesh))
        held = {name: of_table[name] for name in store.fields}
        self._no_rows = jax.jit(self._empty, out_shardings=held)
        self._taken = jax.jit(_taken)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is under way and ends the threads."""
        self._returners.shutdown(wait=True)
        for ticket in self._under_way.values():
            # A ticket that is never applied returns nothing; who waits for it must not wait on.
            if not ticket.returned.done():
                ticket.returned.set_exception(CancelledError())
        for pool in (self._stagers, self._copiers):
            pool.shutdown(wait=True, cancel_futures=True)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all fields of the store, over all columns."""
        return self.spec.row_bytes(*self.store.fields)

    def load(self) -> DeviceArrays:
        """The device side with the rows that the slots hold, from the store, piece by piece."""
        arrays = self._no_rows()
        size = self._piece_rows
        for first in range(0, self._slots_per_owner, size):
            first = min(first, self._slots_per_owner - size)
            piece = slice(first, first + size)
            rows = {shard: held[piece] for shard, held in self._held.items()}
            staged = self._staged(rows, size)
            places = np.arange(first, first + size, dtype=np.int32)
            of_device = dict.fromkeys(self._owner_of, places)
            _, arrays = self._shards.swap(arrays, staged, of_device, leave=False)
            # One piece at a time in memory.
            jax.block_until_ready(arrays)
        return arrays

    def compile(self, arrays: DeviceArrays, most_rows: int) -> DeviceArrays:
        """Compiles what swaps of up to so many rows need, and what makes them; `arrays` is donated.

        Nothing changes.
        """
        for size in move_sizes(most_rows):
            nothing = {block.shard: np.empty(0, np.int64) for block in self.store.blocks}
            # Past the end, as what fills the rest of a move.
            places = np.arange(size, dtype=np.int32) + self._slots_per_owner
            of_device = dict.fromkeys(self._owner_of, places)
            staged = self._staged(nothing, size)
            _, arrays = self._shards.swap(arrays, staged, of_device, leave=not self._read_only)
        if self.store.first is not None:
            self.store.first.compile(self.spec, most_rows)
        return arrays

    def fits(self, asked: AskedRows) -> bool:
        """See `RowSlots.fits`."""
        return self._slots.fits(asked)

    def staying(self, asked: AskedRows, before: Sequence[AskedRows]) -> AskedRows:
        """See `RowSlots.staying`."""
        return self._slots.staying(asked, before)

    def too_few(self, asked: AskedRows) -> InputError:
        """See `RowSlots.too_few`."""
        return self._slots.too_few(asked)

    def ticket(
        self, asked: AskedRows, pinned: AskedRows | None = None, *, record: bool = True
    ) -> Ticket:
        """Chooses the slots of a batch's rows and starts to fetch those that are missing.

        Args:
            asked: by the batch.
            pinned: rows that must stay because batches before this one, whose tickets may be
                applied late, need them; None for none.
            record: whether this counts as use of the rows.

        Raises:
            InputError: the rows do not fit; names how many slots would do.
        """
        move = self._slots.assign(asked, pinned, record=record)
        self._numbers += 1
        ticket = Ticket(self._numbers, move, None, Future())
        if not move.size:
            return ticket
        # A returned ticket is struck off by its thread, perhaps at this moment.
        earlier = list(self._under_way.values())
        futures = [other.returned for other in earlier if self._takes_away(other, move)]
        self._under_way[ticket.number] = ticket
        ticket.staged = self._stagers.submit(self._stage, ticket, futures)
        self._waiting.append(ticket)
        return ticket

    def apply(self, arrays: DeviceArrays, ticket: Ticket) -> DeviceArrays:
        """Swaps a ticket's rows into their slots; `arrays` is donated.

        Tickets are applied in the order in which they were made. Waits for the rows, and raises
        what went wrong in the threads since the last call, as it was.
        """
        self._raise_failures()
        for shard, asked in self._asked.items():
            asked[ticket.move.assignments[shard].slots] = True
        if ticket.staged is None:
            return arrays
        staged = self._wait_for(ticket.staged, arrays)
        # Whoever keeps the ticket through the step must not keep the buffers on the device.
        self._waiting.popleft().staged = None
        of_owner = {n: ticket.move.places(n, self._slots_per_owner) for n in self._held}
        places = {device: of_owner[owner] for device, owner in self._owner_of.items()}
        left, arrays = self._shards.swap(arrays, staged, places, leave=not self._read_only)
        for shard, held in self._held.items():
            assignment = ticket.move.assignments[shard]
            held[assignment.places] = assignment.missing
        if self._read_only:
            ticket.returned.set_result(None)
            del self._under_way[ticket.number]
            return arrays
        if self._out_of_order:
            jax.block_until_ready(left)
        shards = [shards_on(left, block.devices[0]) for block in self.store.blocks]
        for array in (array for of_block in shards for array in of_block.values()):
            array.copy_to_host_async()
        self._returning.append(self._returners.submit(self._return, ticket, shards))
        # Rows that travel back take memory on the device.
        while len(self._returning) > self._ahead + 1:
            self._returning.popleft().result()
        return arrays

    def slots(self, ticket: Ticket, room: int) -> jax.Array:
        """[owners * room] int32 on the devices: slots of the rows that each owner is asked for."""

        def line(index) -> np.ndarray:
            owner = (index[0].start or 0) // room
            return ticket.move.slots(owner, room, self._slots_per_owner)

        return jax.make_array_from_callback(
            (self._owners * room,), NamedSharding(self._mesh, self.spec.index_spec), line
        )

    def write_back(self, arrays: DeviceArrays) -> None:
        """Brings the store up to date with the devices: rows change where batches ask for them."""
        while self._returning:
            self._returning.popleft().result()
        for block in self.store.blocks:
            shards = shards_on(arrays, block.devices[0])
            held = self._held[block.shard]
            asked = np.flatnonzero(self._asked[block.shard]).astype(np.int32)
            for first in range(0, len(asked), self._piece_rows):
                slots = asked[first : first + self._piece_rows]
                # One program: the rest is filled with what is there already.
                places = np.resize(slots, self._piece_rows)
                piece = {n: np.asarray(self._taken(shard, places)) for n, shard in shards.items()}
                self.store.write(block, held[slots], piece)
        for asked in self._asked.values():
            asked[:] = False

    def take_stall(self) -> float:
        """Seconds since the last call in which devices had no work because rows were missing."""
        stall, self._stall = self._stall, 0.0
        return stall

    def _takes_away(self, ticket: Ticket, move: Move) -> bool:
        """Whether a row that enters a local shard left it with a ticket.

        A row that went and came more than once left with several, of which only the last may be
        under way still: it came back after all before that had returned.
        """
        pairs = ((ticket.move.assignments[n], move.assignments[n]) for n in self._held)
        return any(_in_common(left.evicted, entering.missing) for left, entering in pairs)

    def _wait_for(self, staged: Future, arrays: DeviceArrays) -> DeviceArrays:
        """The staged rows; counts as stall the time in which the devices have nothing else to do.

        The devices are still computing as long as `arrays`, the result of the last step, is not
        there.
        """
        idle_since = None
        while not staged.done():
            concrete: list[Any] = list(arrays.values())
            if idle_since is None and all(array.is_ready() for array in concrete):
                idle_since = time.perf_counter()
            wait([staged], timeout=_POLL_SECONDS)
        if idle_since is not None:
            self._stall += time.perf_counter() - idle_since
        return staged.result()

    def _raise_failures(self) -> None:
        while self._returning and self._returning[0].done():
            self._returning.popleft().result()
        # Those of later tickets too: they would be noticed some steps from now.
        for ticket in self._waiting:
            if ticket.staged is not None and ticket.staged.done():
                ticket.staged.result()

    def _stage(self, ticket: Ticket, waits: list[Future]) -> DeviceArrays:
        for returned in waits:
            returned.result()
        start = time.perf_counter()
        rows = {shard: ticket.move.assignments[shard].missing for shard in self._held}
        staged = self._staged(rows, ticket.move.size)
        jax.block_until_ready(staged)
        ticket.seconds = time.perf_counter() - start
        return staged

    def _staged(self, rows: dict[int, np.ndarray], size: int) -> DeviceArrays:
        """Rows of each local shard on its devices, [size, ...] for each."""
        # Nobody writes to the buffers again: a transfer may read them as long as it likes.
        buffers: dict[jax.Device, Arrays] = {}
        for block in self.store.blocks:
            buffers |= dict.fromkeys(block.devices, self._gathered(block, rows[block.shard], size))
        return self._shards.staged(buffers)

    def _gathered(self, block: HostBlock, rows: np.ndarray, size: int) -> Arrays:
        """Fresh buffers [size, ...] of every field, the first of them filled with the rows."""
        buffers = {
            name: np.empty((size, *array.shape[1:]), array.dtype)
            for name, array in block.arrays.items()
        }
        step = max(1, _PIECE_BYTES * size // max(1, _nbytes(buffers)) // 4)
        jobs = [
            self._copiers.submit(
                self.store.gather,
                block,
                rows[first : first + step],
                {name: buffer[first:] for name, buffer in buffers.items()},
            )
            for first in range(0, len(rows), step)
        ]
        for job in jobs:
            job.result()
        return buffers

    def _return(self, ticket: Ticket, left: list[DeviceArrays]) -> None:
        try:
            for block, shards in zip(self.store.blocks, left, strict=True):
                evicted = ticket.move.assignments[block.shard].evicted
                self.store.write(block, evicted, {n: np.asarray(a) for n, a in shards.items()})
        except BaseException as error:
            ticket.returned.set_exception(error)
            raise
        ticket.returned.set_result(None)
        del self._under_way[ticket.number]

    def _empty(self) -> DeviceArrays:
        shapes = {name: self.spec.shape(name, self.spec.num_slots) for name in self.store.fields}
        return {
            name: stored(jnp.zeros(shape, self.spec.field(name).dtype))
            for name, shape in shapes.items()
        }


def _in_common(some: np.ndarray, others: np.ndarray) -> bool:
    """Whether two rising arrays have a number in common."""
    return bool((np.searchsorted(some, others, "right") > np.searchsorted(some, others)).any())


def _nbytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _taken(field: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows of a field, logical."""
    return logical(jnp.take(field, slots, axis=min(1, field.ndim - 1)))
